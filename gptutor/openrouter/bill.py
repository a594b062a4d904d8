"""Finds the bill in what OpenRouter sends: a scanner for event streams, a reader for plain answers. No I/O.

OpenRouter states a request's price once, as the `usage` object at the top level of one JSON value: the answer itself, or the data
of one server-sent event, usually the last before `[DONE]`. The scanner is fed the stream's bytes as they pass, in whatever pieces
they arrive, and finds the same bill for every way of cutting them.

How it stays cheap: an event that holds a bill contains the seven bytes `"usage"`, quotes included. Inside a JSON string quotes
are escaped, so a model that writes `{"usage": …}` in its text cannot produce them. A chunk that ends at an event boundary and
lacks the seven bytes costs one search; only events that have them are parsed, and only a `usage` at the top level counts.

How it stays bounded: an event longer than EVENT_BYTES_MAX is skipped to its end. It cannot hold a bill of ours, and a bill that
is missed here is asked for at `/generation`.

An event ends at a blank line. Lines end in LF, CR or CRLF, so the ends of events are the places where one of these stands:
LF LF, LF CR, CR CR. (CRLF CRLF contains LF CR. A rest of the blank line's own CRLF begins the next event as one more blank line,
which changes nothing.)
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import msgspec

EVENT_BYTES_MAX = 1024 * 1024
MARK = b'"usage"'
EVENT_ENDS = (b"\n\n", b"\n\r", b"\r\r")
EVENT_END = re.compile(b"|".join(EVENT_ENDS))
LINE_END = re.compile(rb"\r\n|\n|\r")
NUMBER = re.compile(r"(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?")
GENERATION_ID = re.compile(r"[!-~]{1,200}")
NUMBER_CHARACTERS_MAX = 64
COST_USD_MAX = Decimal(100_000)


@dataclass(frozen=True, slots=True)
class Bill:
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
    usage: _Usage | None = None
    id: Any = None


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_details = msgspec.json.Decoder(_CostDetails | None).decode


def read_bill(document: bytes) -> Bill | None:
    """The bill in one JSON value, or None where it states no usable price."""
    try:
        envelope = _decode_envelope(document)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    if envelope.usage is None:
        return None
    cost = parse_usd(bytes(envelope.usage.cost))
    if cost is None:
        return None
    if envelope.usage.is_byok is True:
        # With a provider key of our own, `cost` is OpenRouter's fee alone and the provider's bill stands beside it.
        provider = _provider_cost(bytes(envelope.usage.cost_details))
        if provider is None:
            return None
        cost += provider
    return Bill(
        cost_usd=cost,
        prompt_tokens=_count(envelope.usage.prompt_tokens),
        completion_tokens=_count(envelope.usage.completion_tokens),
        generation_id=sane_generation_id(envelope.id),
    )


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
    """Listens to an event stream: `feed` it every chunk, `finish` it at the end, and read `bill` (the last one stated)."""

    __slots__ = ("_rest", "_skipping", "bill")

    def __init__(self) -> None:
        self.bill: Bill | None = None
        self._rest = bytearray()  # the beginning of an event whose end has not come
        self._skipping = False  # inside an event that is too long

    def feed(self, chunk: bytes) -> None:
        if not self._rest and not self._skipping and chunk.endswith(EVENT_ENDS) and MARK not in chunk:
            return  # whole events, none with a bill: nearly every chunk of nearly every stream
        rest = self._rest
        searched = max(0, len(rest) - 1)  # an end may straddle the seam
        rest += chunk
        end = max(rest.rfind(mark, searched) for mark in EVENT_ENDS) + 2
        if end >= 2:
            self._read(bytes(rest[:end]))
            del rest[:end]
            self._skipping = False
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

    def _read(self, block: bytes) -> None:
        if MARK not in block:
            return
        for event in EVENT_END.split(block)[self._skipping :]:
            if MARK in event and len(event.strip(b"\r\n")) <= EVENT_BYTES_MAX:
                lines = LINE_END.split(event)
                data = b"\n".join(line[5:] for line in lines if line.startswith(b"data:"))
                self.bill = read_bill(data) or self.bill


def _provider_cost(details: bytes) -> Decimal | None:
    try:
        decoded = _decode_details(details)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return parse_usd(bytes(decoded.upstream_inference_cost)) if decoded else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None
