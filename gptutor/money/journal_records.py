"""The lines of the journal: one line for each fact about an open hold, written after its request was sent.

Every line begins with the CRC-32 of the rest. A line that was torn by a crash, or damaged on disk, fails that check.
"""

import uuid
import zlib
from dataclasses import dataclass
from decimal import Decimal

from gptutor.money.amounts import AccountId, Nano
from gptutor.money.holds import HoldId
from gptutor.money.pricing import Charge


@dataclass(slots=True)
class HoldRecord:
    """What the journal says of one open hold whose request was sent."""

    account_id: AccountId
    generation_id: str | None = None
    charge: Charge | None = None


def parse_line(line: bytes) -> list[bytes] | None:
    """The fields of a line, its keyword first; None if the checksum is wrong."""
    checksum, _, payload = line.partition(b" ")
    try:
        if int(checksum, 16) != zlib.crc32(payload):
            return None
    except ValueError:
        return None
    return payload.split(b" ")


def apply_line(records: dict[HoldId, HoldRecord], fields: list[bytes]) -> None:
    """Updates the records by one line about a hold. Raises ValueError, KeyError or IndexError if the line is malformed."""
    keyword, *values = fields
    if keyword == b"closed":
        records.pop(HoldId(uuid.UUID(values[0].decode())), None)
        return
    hold_id = HoldId(uuid.UUID(values[1].decode()))
    record = records.setdefault(hold_id, HoldRecord(AccountId(int(values[0]))))
    if keyword == b"named":
        record.generation_id = values[2].decode()
    elif keyword == b"billed":
        tokens = [
            None if value == b"-" else int(value) for value in values[5:7]
        ]  # lines of the previous release have no token counts
        record.charge = Charge(Nano(int(values[2])), Decimal(values[3].decode()), *tokens)
        record.generation_id = None if values[4] == b"-" else values[4].decode()


def owner_line(owner: uuid.UUID, boot: bytes) -> bytes:
    return _with_checksum(b"owner %s %s" % (str(owner).encode(), boot))


def closed_line(hold_id: HoldId) -> bytes:
    return _with_checksum(b"closed %s" % hold_id.hex.encode())


def sent_line(hold_id: HoldId, account_id: AccountId) -> bytes:
    return _with_checksum(b"sent %d %s" % (account_id, hold_id.hex.encode()))


def named_line(hold_id: HoldId, account_id: AccountId, generation_id: str) -> bytes:
    return _with_checksum(b"named %d %s %s" % (account_id, hold_id.hex.encode(), generation_id.encode()))


def billed_line(hold_id: HoldId, record: HoldRecord, charge: Charge) -> bytes:
    generation_id = (record.generation_id or "-").encode()
    cost = str(charge.cost_usd).encode()
    tokens = b"%b %b" % (_token_count(charge.prompt_tokens), _token_count(charge.completion_tokens))
    return _with_checksum(
        b"billed %d %s %d %s %s %s" % (record.account_id, hold_id.hex.encode(), charge.amount, cost, generation_id, tokens)
    )


def _token_count(tokens: int | None) -> bytes:
    return b"-" if tokens is None else b"%d" % tokens


def _with_checksum(payload: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(payload), payload)
