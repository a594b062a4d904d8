"""Finds the bill in a response of OpenRouter: a scanner for event streams, a reader for plain JSON. No I/O.

Beside the bill, both find what matters without one: the generation id, and whether OpenRouter itself ended the response. The
scanner also sees whether the response is complete without such an end.

OpenRouter states a request's cost once, as the `usage` object at the top level of one JSON value: the plain response itself, or
the data of one server-sent event, usually the last before `[DONE]`. The scanner is fed the chunks of the stream, and finds the
same bill however the bytes are split into chunks.

Why scanning is cheap: an event with a bill contains `"usage"`, quotes included, which hardly any other event does. A chunk that
ends at an event boundary and contains none of the marks costs one search for each mark, and no copy. Only events with a mark are
parsed, and only their top level counts: what a model writes in its text is inside a string.

Why memory is bounded: of an event longer than EVENT_BYTES_MAX, as one with an image, only the wanted members are kept
(`json_members.py`). Its finish reason is not looked for.

An event ends at a blank line. Lines end in LF, CR or CRLF, so an event ends wherever one of these appears: LF LF, LF CR, CR CR.
(CRLF CRLF contains LF CR. The remaining LF of the blank line's CRLF begins the next event as one more blank line, which changes
nothing.)
"""

import re
from decimal import Decimal
from typing import Any

import msgspec

from gptutor.openrouter.json_members import MemberReader

EVENT_BYTES_MAX = 1024 * 1024
# The beginnings of `"usage"`, `[DONE]` and `"error"`: from six bytes on Python searches by another algorithm, slower here.
USAGE_MARK = b'"usag'
DONE_MARK = b"[DONE"
ERROR_MARK = b'"erro'
FINISH_MARK = b'on":"'
"""In `"finish_reason":"stop"`, and not in `"finish_reason":null`, which every event has."""
FINISH_REASON = re.compile(rb'"finish_reason" ?: ?"')
"""Never in a model's text, whose quotation marks are escaped."""
DATA_FIELD = b"data:"
EVENT_ENDS = (b"\n\n", b"\n\r", b"\r\r")
EVENT_END = re.compile(b"|".join(EVENT_ENDS))
NUMBER = re.compile(r"(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?")
GENERATION_ID = re.compile(r"[!-~]{1,200}")
NUMBER_CHARACTERS_MAX = 64
COST_USD_MAX = Decimal(100_000)


class Bill(msgspec.Struct, frozen=True):
    """What a request cost, as OpenRouter states it: exact dollars, and the numbers of tokens where stated."""

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
    """What one JSON value says about the purchase: its cost, its generation id, an error; each may be absent."""

    bill: Bill | None = None
    generation_id: str | None = None
    is_error: bool = False


EMPTY_REPORT = UsageReport()


def read_usage_report(document: bytes) -> UsageReport:
    """Reads the top level of a plain response, or of the data of an event; anything but a JSON object is an empty report."""
    try:
        envelope = _decode_envelope(document)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return EMPTY_REPORT
    return _report(envelope.usage, envelope.id, has_error=envelope.error is not None)


def _report(usage: bytes, identity: object, *, has_error: bool) -> UsageReport:
    generation_id = valid_generation_id(identity)
    return UsageReport(_read_usage(usage, generation_id), generation_id, has_error)


def _read_usage(raw: bytes, generation_id: str | None) -> Bill | None:
    try:
        usage = _decode_usage(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    if usage is None:
        return None
    cost = parse_usd(bytes(usage.cost))
    if cost is not None and usage.is_byok is True:
        # With a provider key of our own (BYOK), `cost` is OpenRouter's fee alone; the provider's cost is stated beside it.
        provider_cost = _provider_cost(bytes(usage.cost_details))
        cost = cost + provider_cost if provider_cost is not None else None
    if cost is None:
        return None
    return Bill(cost, _count(usage.prompt_tokens), _count(usage.completion_tokens), generation_id)


def parse_usd(number: bytes) -> Decimal | None:
    """A JSON number as exact dollars; None for anything else, for a negative or overlong number, and from COST_USD_MAX on."""
    text = number.decode("ascii", "replace").strip()
    if len(text) > NUMBER_CHARACTERS_MAX or not NUMBER.fullmatch(text):
        return None
    cost = Decimal(text)
    return cost if cost < COST_USD_MAX else None


def valid_generation_id(value: object) -> str | None:
    """OpenRouter's generation id, or None for a value that cannot be stored and looked up."""
    return value if isinstance(value, str) and GENERATION_ID.fullmatch(value) else None


class LongEvent:
    """Reads an event of any length: `feed` it what lies before its blank line, in pieces, then ask for `report`."""

    __slots__ = ("_is_data", "_line", "_reader")

    def __init__(self) -> None:
        self._reader = MemberReader([("usage",), ("id",), ("error",)])
        self._line = b""
        """The beginning of the current line, until it tells whether the line is data."""
        self._is_data = False

    def feed(self, piece: bytes) -> None:
        for part in piece.splitlines(keepends=True):
            if self._is_data:
                self._reader.feed(part)
            elif len(self._line) < len(DATA_FIELD):
                self._line += part
                if self._line.startswith(DATA_FIELD):
                    self._is_data = True
                    self._reader.feed(self._line[len(DATA_FIELD) :])
                self._line = self._line[: len(DATA_FIELD)]
            if part.endswith((b"\n", b"\r")):
                self._line, self._is_data = b"", False

    def report(self) -> UsageReport:
        if not self._reader.is_whole:
            return EMPTY_REPORT
        values = self._reader.values
        identity, error = values.get(("id",), b"null"), values.get(("error",), b"null")
        return _report(values.get(("usage",), b"null"), _text(identity), has_error=error != b"null")


class BillScanner:
    """Scans an event stream: `feed` it every chunk, and call `finish` at the end.

    `bill` is the last one stated. `generation_id` is that of the headers, else the first in an event. `has_seen_end`: OpenRouter
    itself ended the response, by `[DONE]` or by an error event. `has_finish_reason`: an event stated why the model stopped.
    """

    __slots__ = ("_ends_with_bill", "_long_event", "_partial", "bill", "generation_id", "has_finish_reason", "has_seen_end")

    def __init__(self, generation_id: str | None = None) -> None:
        self.bill: Bill | None = None
        self.generation_id = generation_id
        self.has_seen_end = False
        self.has_finish_reason = False
        self._partial = bytearray()  # the beginning of an event whose end has not arrived
        self._long_event: LongEvent | None = None  # then `_partial` is its last byte: the blank line may be split
        self._ends_with_bill = False  # no event with data has followed the bill

    def feed(self, chunk: bytes) -> None:
        partial = self._partial
        if not partial and chunk.endswith(EVENT_ENDS):
            # Whole events without a mark: nearly every chunk of every stream, so the check is inlined.
            if (
                USAGE_MARK in chunk
                or DONE_MARK in chunk
                or ERROR_MARK in chunk
                or (FINISH_MARK in chunk and not self.has_finish_reason)
                or self.generation_id is None
            ):
                self._read(chunk)
            elif self._ends_with_bill:
                self._skip(chunk)
            return
        if self._long_event is not None:
            chunk = self._feed_long_event(self._long_event, bytes(partial) + chunk)
        end = _last_event_end(chunk)
        if not end and bytes(partial[-1:]) + chunk[:1] in EVENT_ENDS:
            end = 1  # the blank line was split between two chunks
        if end:
            self._read(bytes(partial) + chunk[:end])
            partial[:] = chunk[end:]
        else:
            partial += chunk
        if len(partial) > EVENT_BYTES_MAX and len(partial.strip(b"\r\n")) > EVENT_BYTES_MAX:
            self._long_event = LongEvent()
            self._feed_long_event(self._long_event, bytes(partial))

    def finish(self) -> None:
        """The stream has ended: an event that lacks only its blank line counts as well."""
        if self._long_event is not None:
            self._feed_long_event(self._long_event, bytes(self._partial) + EVENT_ENDS[0])
        self._read(bytes(self._partial))

    def _feed_long_event(self, event: LongEvent, block: bytes) -> bytes:
        """Returns what follows the event, if its end is in the block. `_partial` is empty then, else the block's last byte."""
        end = _first_event_end(block)
        if not end:
            event.feed(block[:-1])
            self._partial[:] = block[-1:]
            return b""
        event.feed(block[: end - 2])
        self._long_event = None
        self._partial.clear()
        self._apply(event.report())
        return block[end:]

    @property
    def at_event_boundary(self) -> bool:
        """Whether an event of our own may be written here: not in the middle of an event."""
        return self._long_event is None and not self._partial.strip(b"\r\n")

    @property
    def expects_end(self) -> bool:
        """Whether only the end of the stream is expected: OpenRouter ended the response, or its last event was the bill."""
        return self.has_seen_end or self._ends_with_bill

    @property
    def is_complete(self) -> bool:
        """Whether a stream that ends here, without `[DONE]`, lacks nothing else: it has a finish reason and the bill."""
        return self.has_finish_reason and self.bill is not None and self.at_event_boundary

    def _marks(self, block: bytes) -> list[int]:
        """Where each mark is found first."""
        marks = (
            (USAGE_MARK, DONE_MARK, ERROR_MARK) if self.has_finish_reason else (USAGE_MARK, DONE_MARK, ERROR_MARK, FINISH_MARK)
        )
        return [at for at in map(block.find, marks) if at >= 0]

    def _skip(self, block: bytes, until: int | None = None) -> None:
        """Passes over events without a mark, as far as `until`."""
        self._ends_with_bill = self._ends_with_bill and block.find(DATA_FIELD, 0, until) < 0

    def _read(self, block: bytes) -> None:
        """Reads a block of whole events."""
        if self.generation_id is not None:
            marks = self._marks(block)
            if not marks:
                self._skip(block)
                return
            # Mostly it is the last of many events that has a mark: those before it are skipped at once.
            if cut := _last_event_end(block, until=min(marks)):
                self._skip(block, until=cut)
                block = block[cut:]
        for event in _events(block):
            has_no_news = self.generation_id is not None and not self._marks(event)
            if DATA_FIELD not in event or has_no_news:
                self._skip(event)
                continue
            if len(event.strip(b"\r\n")) > EVENT_BYTES_MAX:
                long_event = LongEvent()
                long_event.feed(event)
                self._apply(long_event.report())
                continue
            data = b"\n".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))
            if data.strip() == b"[DONE]":
                self.has_seen_end = True
                continue
            self.has_finish_reason = self.has_finish_reason or FINISH_REASON.search(data) is not None
            self._apply(read_usage_report(data))

    def _apply(self, report: UsageReport) -> None:
        self._ends_with_bill = report.bill is not None
        self.bill = report.bill or self.bill
        self.generation_id = self.generation_id or report.generation_id
        self.has_seen_end = self.has_seen_end or report.is_error


def _last_event_end(chunk: bytes, until: int | None = None) -> int:
    """Where the last event that ends before `until` ends; 0 for none."""
    ends = EVENT_ENDS if b"\r" in chunk else EVENT_ENDS[:1]  # an absent one is searched for through the whole chunk
    last = max([chunk.rfind(end, 0, until) for end in ends])
    return last + 2 if last >= 0 else 0


def _first_event_end(block: bytes) -> int:
    """Where the first event ends; 0 for none."""
    if b"\r" in block:
        found = EVENT_END.search(block)
        return found.end() if found else 0
    return block.find(EVENT_ENDS[0]) + 2 if EVENT_ENDS[0] in block else 0


def _events(block: bytes) -> list[bytes]:
    """Without CR, which the expression needs, a search for LF LF is a hundred times as fast."""
    return EVENT_END.split(block) if b"\r" in block else block.split(b"\n\n")


def _provider_cost(details: bytes) -> Decimal | None:
    try:
        decoded = _decode_details(details)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return parse_usd(bytes(decoded.upstream_inference_cost)) if decoded else None


def _text(raw: bytes) -> object:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None
