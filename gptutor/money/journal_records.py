"""The lines of the journal: one line for each fact about an open hold, written after its request was sent.

Every line begins with the CRC-32 of the rest. A line that was torn by a crash, or damaged on disk, fails that check.
"""

import re
import uuid
import zlib
from dataclasses import dataclass
from decimal import Decimal
from urllib.parse import quote, unquote

from gptutor.money.amounts import AccountId, Nano
from gptutor.money.holds import HoldFacts, HoldId
from gptutor.money.pricing import Charge

PLAIN_WORD = re.compile(r"[\w.:/~@-]+", re.ASCII)


@dataclass(slots=True)
class HoldRecord:
    """What the journal says of one hold whose request was sent."""

    account_id: AccountId
    generation_id: str | None = None
    charge: Charge | None = None
    facts: HoldFacts | None = None
    """None: the record is of an earlier release."""
    is_handed_over: bool = False
    """Closed, but not by a charge or a release: recovery has it."""


def parse_line(line: bytes) -> list[bytes] | None:
    """The fields of a line, its keyword first; None if the checksum is wrong."""
    checksum, _, payload = line.partition(b" ")
    try:
        if int(checksum, 16) != zlib.crc32(payload):
            return None
    except ValueError:
        return None
    return payload.split(b" ")


def apply_line(open_holds: dict[HoldId, HoldRecord], closed_holds: dict[HoldId, HoldRecord], fields: list[bytes]) -> None:
    """Updates the records by one line about a hold. Raises ValueError, KeyError or IndexError if the line is malformed."""
    keyword, *values = fields
    if keyword in (b"closed", b"handed_over"):
        hold_id = HoldId(uuid.UUID(values[0].decode()))
        if (record := open_holds.pop(hold_id, None)) is not None:
            record.is_handed_over = keyword == b"handed_over"
            closed_holds[hold_id] = record
        return
    if keyword not in (b"sent", b"named", b"billed"):
        raise ValueError(keyword)
    hold_id = HoldId(uuid.UUID(values[1].decode()))
    record = open_holds.setdefault(hold_id, HoldRecord(AccountId(int(values[0]))))
    if keyword == b"sent":
        closed_holds.pop(hold_id, None)  # another attempt
        record.facts = _parse_facts(values[2:]) if len(values) > 2 else None
    elif keyword == b"named":
        record.generation_id = values[2].decode()
    else:
        tokens = [
            None if value == b"-" else int(value) for value in values[5:7]
        ]  # lines of the previous release have no token counts
        record.charge = Charge(Nano(int(values[2])), Decimal(values[3].decode()), *tokens)
        record.generation_id = None if values[4] == b"-" else values[4].decode()


def owner_line(owner: uuid.UUID, boot: bytes, begun_ms: int) -> bytes:
    return _with_checksum(b"owner %s %s %d" % (str(owner).encode(), boot, begun_ms))


def closed_line(hold_id: HoldId) -> bytes:
    return _with_checksum(b"closed %s" % hold_id.hex.encode())


def handed_over_line(hold_id: HoldId) -> bytes:
    return _with_checksum(b"handed_over %s" % hold_id.hex.encode())


def sent_line(hold_id: HoldId, record: HoldRecord) -> bytes:
    facts = record.facts
    if facts is None:
        return _with_checksum(b"sent %d %s" % (record.account_id, hold_id.hex.encode()))
    return _with_checksum(
        b"sent %d %s %d %s %s %s %s"
        % (
            record.account_id,
            hold_id.hex.encode(),
            facts.amount,
            str(facts.rub_per_usd).encode(),
            facts.key_hash_beginning.hex().encode(),
            _word(facts.request_id),
            _word(facts.model),
        )
    )


def named_line(hold_id: HoldId, account_id: AccountId, generation_id: str) -> bytes:
    return _with_checksum(b"named %d %s %s" % (account_id, hold_id.hex.encode(), generation_id.encode()))


def billed_line(hold_id: HoldId, record: HoldRecord, charge: Charge) -> bytes:
    generation_id = (record.generation_id or "-").encode()
    cost = str(charge.cost_usd).encode()
    tokens = b"%b %b" % (_token_count(charge.prompt_tokens), _token_count(charge.completion_tokens))
    return _with_checksum(
        b"billed %d %s %d %s %s %s" % (record.account_id, hold_id.hex.encode(), charge.amount, cost, generation_id, tokens)
    )


def position_line(history: str, wal_bytes: int | None, witness: tuple[AccountId, HoldId] | None) -> bytes:
    account_id, hold_id = witness if witness is not None else (0, None)
    position = b"-" if wal_bytes is None else b"%d" % wal_bytes
    return _with_checksum(
        b"position %s %s %d %s" % (history.encode(), position, account_id, b"-" if hold_id is None else hold_id.hex.encode())
    )


def record_lines(hold_id: HoldId, record: HoldRecord) -> bytes:
    """All that is known of a hold."""
    lines = sent_line(hold_id, record)
    if record.charge is not None:
        return lines + billed_line(hold_id, record, record.charge)
    if record.generation_id is not None:
        return lines + named_line(hold_id, record.account_id, record.generation_id)
    return lines


def _parse_facts(values: list[bytes]) -> HoldFacts:
    amount, rate, key, request_id, model = (value.decode() for value in values)
    return HoldFacts(Nano(int(amount)), Decimal(rate), bytes.fromhex(key), unquote(request_id), unquote(model))


def _word(text: str) -> bytes:
    """One field of a line, whatever the text has in it."""
    return (text if PLAIN_WORD.fullmatch(text) else quote(text, safe="")).encode()


def _token_count(tokens: int | None) -> bytes:
    return b"-" if tokens is None else b"%d" % tokens


def _with_checksum(payload: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(payload), payload)
