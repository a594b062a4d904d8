"""What may be known of an open hold after its request was sent, and how the journal spells it: one line for each thing learnt.

Every line begins with the CRC-32 of the rest: a line that a death tore, or a disk spoilt, does not check.
"""

import uuid
import zlib
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from gptutor.money.amounts import AccountId, Nano
from gptutor.money.holds import HoldId, Settlement


class Charge(NamedTuple):
    """What OpenRouter wants for a request, in dollars, and what the account is charged for it; and its count of tokens."""

    charge: Nano
    cost_usd: Decimal
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def settlement(self, account_id: AccountId, hold_id: HoldId, generation_id: str | None) -> Settlement:
        """Of the hold under which it was bought."""
        return Settlement(
            account_id, hold_id, self.charge, self.cost_usd, generation_id, self.prompt_tokens, self.completion_tokens
        )


@dataclass(slots=True)
class HoldRecord:
    """What is known of one open hold after it was sent."""

    account_id: AccountId
    generation_id: str | None = None
    price: Charge | None = None


def payload_of(line: bytes) -> list[bytes] | None:
    """The fields of a line, its kind first; None if it does not check."""
    check, _, payload = line.partition(b" ")
    try:
        if int(check, 16) != zlib.crc32(payload):
            return None
    except ValueError:
        return None
    return payload.split(b" ")


def learn(known: dict[HoldId, HoldRecord], fields: list[bytes]) -> None:
    """Takes in what a line about a hold says. Raises ValueError, KeyError or IndexError if it says nothing of the kind."""
    kind, *values = fields
    if kind == b"closed":
        known.pop(HoldId(uuid.UUID(values[0].decode())), None)
        return
    hold_id = HoldId(uuid.UUID(values[1].decode()))
    knowledge = known.setdefault(hold_id, HoldRecord(AccountId(int(values[0]))))
    if kind == b"named":
        knowledge.generation_id = values[2].decode()
    elif kind == b"billed":
        tokens = [None if value == b"-" else int(value) for value in values[5:7]]  # the version before wrote none
        knowledge.price = Charge(Nano(int(values[2])), Decimal(values[3].decode()), *tokens)
        knowledge.generation_id = None if values[4] == b"-" else values[4].decode()


def owner_line(owner: uuid.UUID, boot: bytes) -> bytes:
    return _line(b"owner %s %s" % (str(owner).encode(), boot))


def closed_line(hold_id: HoldId) -> bytes:
    return _line(b"closed %s" % hold_id.hex.encode())


def sent_line(hold_id: HoldId, account_id: AccountId) -> bytes:
    return _line(b"sent %d %s" % (account_id, hold_id.hex.encode()))


def named_line(hold_id: HoldId, account_id: AccountId, generation_id: str) -> bytes:
    return _line(b"named %d %s %s" % (account_id, hold_id.hex.encode(), generation_id.encode()))


def billed_line(hold_id: HoldId, knowledge: HoldRecord, price: Charge) -> bytes:
    generation = (knowledge.generation_id or "-").encode()
    cost = str(price.cost_usd).encode()
    tokens = b"%b %b" % (_count(price.prompt_tokens), _count(price.completion_tokens))
    return _line(
        b"billed %d %s %d %s %s %s" % (knowledge.account_id, hold_id.hex.encode(), price.charge, cost, generation, tokens)
    )


def _count(tokens: int | None) -> bytes:
    return b"-" if tokens is None else b"%d" % tokens


def _line(payload: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(payload), payload)
