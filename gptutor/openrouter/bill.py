"""Finds the bill in what OpenRouter sends: a scanner for event streams, a reader for plain answers. No I/O.

Beside the bill it notes the two things that matter where there is none: OpenRouter's name for the answer, and whether OpenRouter
itself has ended it.

OpenRouter states a request's price once, as the `usage` object at the top level of one JSON value: the answer itself, or the data
of one server-sent event, usually the last before `[DONE]`. The scanner is fed the stream's bytes as they pass, in whatever pieces
they arrive, and finds the same bill for every way of cutting them.

How it stays cheap: an event that holds a bill contains `"usage"`, quotes included, which hardly any other does. A chunk that ends
at an event boundary and has none of the marks looked for costs a search for each, and no copy; only events that have one are
parsed, and only their top level counts: what a model writes in its text is inside a string.

How it stays bounded: an event longer than EVENT_BYTES_MAX is skipped to its end. It cannot hold a bill of ours, and a bill that
is missed here is asked for at `/generation`.

An event ends at a blank line. Lines end in LF, CR or CRLF, so the ends of events are the places where one of these stands:
LF LF, LF CR, CR CR. (CRLF CRLF contains LF CR. A rest of the blank line's own CRLF begins the next event as one more blank line,
which changes nothing.)
"""

import re
from decimal import Decimal
from typing import Any

import msgspec

EVENT_BYTES_MAX = 1024 * 1024
# The beginnings of `"usage"`, `[DONE]` and `"error"`: from six bytes on Python searches in another way, which is slower here.
MARK = b'"usag'
DONE = b"[DONE"
FAULT = b'"erro'
DATA = b"data:"
EVENT_ENDS = (b"\n\n", b"\n\r", b"\r\r")
EVENT_END = re.compile(b"|".join(EVENT_ENDS))
LINE_END = re.compile(rb"\r\n|\n|\r")
NUMBER = re.compile(r"(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?")
GENERATION_ID = re.compile(r"[!-~]{1,200}")
NUMBER_CHARACTERS_MAX = 64
COST_USD_MAX = Decimal(100_000)


class Bill(msgspec.Struct, frozen=True):
    """What OpenRouter says a request cost: exact dollars, and its count of tokens where it gives one."""

    cost_usd: Decimal
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    generation_id: str | None = None


class _CostDetails(msgspec.Struct):
    upstream_inference_cost: msgspec.Raw = msgspec.Raw()


class _Usage(msgspec.Struct):
    cost: msgspec.Raw = msgspec.Raw()
    is_byok: Any = False
    cost_details: msgspec.Raw = msgspec.Raw()
    prompt_tokens: Any = None
    completion_tokens: Any = None


class _Envelope(msgspec.Struct):
    usage: msgspec.Raw = msgspec.Raw(b"null")
    id: Any = None
    error: Any = None


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_usage = msgspec.json.Decoder(_Usage | None).decode
_decode_details = msgspec.json.Decoder(_CostDetails | None).decode


class UsageReport(msgspec.Struct, frozen=True):
    """What one JSON value says of the purchase: a price, a name, a failure; or nothing of the kind."""

    bill: Bill | None = None
    generation_id: str | None = None
    is_error: bool = False


EMPTY_REPORT = UsageReport()


def read_usage_report(document: bytes) -> UsageReport:
    """What an answer, or the data of an event, says at its top level."""
    try:
        envelope = _decode_envelope(document)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return EMPTY_REPORT
    name = sane_generation_id(envelope.id)
    return UsageReport(_read_usage(envelope.usage, name), name, envelope.error is not None)


def _read_usage(raw: bytes, generation_id: str | None) -> Bill | None:
    try:
        usage = _decode_usage(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    if usage is None:
        return None
    cost = parse_usd(bytes(usage.cost))
    if cost is not None and usage.is_byok is True:
        # With a provider key of our own, `cost` is OpenRouter's fee alone and the provider's bill stands beside it.
        provider = _provider_cost(bytes(usage.cost_details))
        cost = cost + provider if provider is not None else None
    if cost is None:
        return None
    return Bill(cost, _count(usage.prompt_tokens), _count(usage.completion_tokens), generation_id)


def parse_usd(spelling: bytes) -> Decimal | None:
    """A JSON number as exact dollars; None for anything but a number from 0 to COST_USD_MAX of sane length."""
    text = spelling.decode("ascii", "replace").strip()
    if len(text) > NUMBER_CHARACTERS_MAX or not NUMBER.fullmatch(text):
        return None
    cost = Decimal(text)
    return cost if cost < COST_USD_MAX else None


def sane_generation_id(value: object) -> str | None:
    """OpenRouter's name for what was bought, if it is a name that can be stored and asked for."""
    return value if isinstance(value, str) and GENERATION_ID.fullmatch(value) else None


class BillScanner:
    """Listens to an event stream: `feed` it every chunk, and `finish` it at the end.

    `bill` is the last one stated. `generation_id` is the name that the headers gave, else the first that an event gives.
    `has_ended` tells that OpenRouter itself has ended the answer, by `[DONE]` or by an error event: a stream that stops without
    either was cut off.
    """

    __slots__ = ("_at_bill", "_rest", "_skipping", "bill", "generation_id", "has_ended")

    def __init__(self, generation_id: str | None = None) -> None:
        self.bill: Bill | None = None
        self.generation_id = generation_id
        self.has_ended = False
        self._rest = bytearray()  # the beginning of an event whose end has not come
        self._skipping = False  # inside an event that is too long
        self._at_bill = False  # no event with data has followed the bill

    def feed(self, chunk: bytes) -> None:
        rest = self._rest
        if not rest and not self._skipping and chunk.endswith(EVENT_ENDS):
            # Whole events, and none of interest: nearly every chunk of every stream, so it is spelled out.
            if MARK in chunk or DONE in chunk or FAULT in chunk or self.generation_id is None:
                self._read(chunk)
            elif self._at_bill:
                self._pass_over(chunk)
            return
        end = _end_of_last(chunk)
        if not end and bytes(rest[-1:]) + chunk[:1] in EVENT_ENDS:
            end = 1  # it straddles the seam
        if end:
            self._read(bytes(rest) + chunk[:end])
            rest[:] = chunk[end:]
            self._skipping = False
        else:
            rest += chunk
        if self._skipping or (len(rest) > EVENT_BYTES_MAX and len(rest.strip(b"\r\n")) > EVENT_BYTES_MAX):
            self._skipping = True
            del rest[:-1]

    def finish(self) -> None:
        """The stream has ended: an event that lacks only its blank line counts as well."""
        self._read(bytes(self._rest))

    @property
    def at_event_end(self) -> bool:
        """Whether something of our own may be written here without falling into the middle of an event."""
        return not self._skipping and not self._rest.strip(b"\r\n")

    @property
    def expects_end(self) -> bool:
        """Whether all has been said: OpenRouter has ended the answer, or the price was the last thing that it stated."""
        return self.has_ended or self._at_bill

    def _is_idle(self, event: bytes) -> bool:
        return MARK not in event and DONE not in event and FAULT not in event and self.generation_id is not None

    def _pass_over(self, block: bytes, until: int | None = None) -> None:
        self._at_bill = self._at_bill and block.find(DATA, 0, until) < 0

    def _read(self, block: bytes) -> None:
        """Whole events."""
        if self.generation_id is not None and not self._skipping:
            marked = [at for at in (block.find(MARK), block.find(DONE), block.find(FAULT)) if at >= 0]
            if not marked:
                self._pass_over(block)
                return
            # Mostly it is the last of many events that is worth a look: those before it are passed over as one.
            if cut := _end_of_last(block, until=min(marked)):
                self._pass_over(block, until=cut)
                block = block[cut:]
        for event in EVENT_END.split(block)[self._skipping :]:
            if DATA not in event or self._is_idle(event) or len(event.strip(b"\r\n")) > EVENT_BYTES_MAX:
                self._pass_over(event)
                continue
            data = b"\n".join(line[5:] for line in LINE_END.split(event) if line.startswith(b"data:"))
            if data.strip() == b"[DONE]":
                self.has_ended = True
                continue
            said = read_usage_report(data)
            self._at_bill = said.bill is not None
            self.bill = said.bill or self.bill
            self.generation_id = self.generation_id or said.generation_id
            self.has_ended = self.has_ended or said.is_error


def _end_of_last(chunk: bytes, until: int | None = None) -> int:
    """Where the last event ends that ends before `until`; 0 for none."""
    ends = EVENT_ENDS if b"\r" in chunk else EVENT_ENDS[:1]  # one that is nowhere is looked for everywhere
    last = max([chunk.rfind(end, 0, until) for end in ends])
    return last + 2 if last >= 0 else 0


def _provider_cost(details: bytes) -> Decimal | None:
    try:
        decoded = _decode_details(details)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return parse_usd(bytes(decoded.upstream_inference_cost)) if decoded else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None
