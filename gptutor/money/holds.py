"""The values that the ledger works with: a hold request, the granted hold, the ways to close it, and why a hold is rejected."""

import random
import time
import uuid
from decimal import Decimal
from typing import Literal, NewType

import msgspec
from asyncpg.pgproto.pgproto import UUID  # the class that rows contain: hashed, compared and formatted in C

from gptutor.money.amounts import AccountId, Nano
from gptutor.money.keys import KeyClaim
from gptutor.money.pricing import Ceiling, Charge

HoldId = NewType("HoldId", uuid.UUID)
Evidence = Literal["response", "generation", "journal"]
"""What proved the cost of a charge: OpenRouter's response, a look-up at /generation, or the journal, which kept what a response
stated to a process that did not settle it, or what the database has lost."""


class HoldRejected(Exception):
    """No hold was made; each subclass is one reason."""


class UnknownKey(HoldRejected):
    """The key is unknown or revoked, or its account is inactive: the statement does not tell which."""


class InsufficientFunds(HoldRejected):
    """The available amount is below what the request may cost, or below the minimum balance."""


class RateLimited(HoldRejected):
    """The account, or the key if `of_key`, has used all its requests of this minute."""

    def __init__(self, *, of_key: bool) -> None:
        super().__init__()
        self.of_key = of_key


class ConcurrencyLimitReached(HoldRejected):
    """The account has as many running requests as its concurrency limit allows."""


class KeyLimitReached(HoldRejected):
    """The request may cost more than is left of the key's spending limit."""


class RepeatedRequest(HoldRejected):
    """The idempotency key was used within 24 hours by the request `request_id`; `same_body`: with the same request body."""

    def __init__(self, request_id: str, *, same_body: bool) -> None:
        super().__init__(request_id)
        self.request_id = request_id
        self.same_body = same_body


class OutcomeUnknown(HoldRejected):
    """The request `request_id` had the same body, came with the same API key moments ago, and may have bought something."""

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id)
        self.request_id = request_id


class HoldRequest(msgspec.Struct, frozen=True):
    """A request for a hold. `body_hash` is the SHA-256 of the request body."""

    claim: KeyClaim
    hold_id: HoldId
    ceiling: Ceiling
    model: str
    request_id: str
    idempotency_key: str | None = None
    body_hash: bytes | None = None

    @property
    def account_id(self) -> AccountId:
        return self.claim.account_id


class HoldFacts(msgspec.Struct, frozen=True):
    """What a hold is placed again with if the database has lost it, besides its ids."""

    amount: Nano
    rub_per_usd: Decimal
    key_hash_beginning: bytes
    """The first 8 bytes of the key's SHA-256: one account has few keys."""
    request_id: str
    model: str


class Hold(msgspec.Struct, frozen=True):
    account_id: AccountId
    hold_id: HoldId
    amount: Nano
    available_before: Nano
    """What the key could spend before this hold: the account's available amount, or what was left of the key's limit if less."""
    minute_requests: int
    """How many requests the account has made in this minute, this one included."""
    facts: HoldFacts | None = None


class Settlement(msgspec.Struct, frozen=True):
    """Closes a hold with the exact charge."""

    account_id: AccountId
    hold_id: HoldId
    charge: Charge
    generation_id: str | None
    facts: HoldFacts | None = None
    """To place the hold again if the database has lost it, and to report a charge above it."""
    evidence: Evidence = "response"


class Release(msgspec.Struct, frozen=True):
    """Closes a hold without a charge: nothing was bought or, if `unresolved`, no evidence of a purchase was ever found."""

    account_id: AccountId
    hold_id: HoldId
    unresolved: bool = False


class HandOver(msgspec.Struct, frozen=True):
    """Leaves an open hold to recovery, with the generation id if it is known."""

    account_id: AccountId
    hold_id: HoldId
    generation_id: str | None
    facts: HoldFacts | None = None
    """To place the hold again if the database has lost it."""


class Mark(msgspec.Struct, frozen=True):
    """Has requests with the same body rejected for a while: this one may have bought something that its client does not get."""

    account_id: AccountId
    hold_id: HoldId
    body_hash: bytes


def new_id() -> HoldId:
    """A UUIDv7 (RFC 9562): it begins with the time, so that new rows are adjacent in the index."""
    milliseconds = time.time_ns() // 1_000_000
    bits = milliseconds << 80 | random.getrandbits(80)  # not a secret: a guessed id gives access to nothing
    bits = bits & ~(0xF << 76) | 0x7 << 76
    bits = bits & ~(0x3 << 62) | 0x2 << 62
    return HoldId(UUID(bits.to_bytes(16)))


def placed_at_ms(hold_id: HoldId) -> int:
    """When an id was made: milliseconds since 1970, by the clock of the process that made it."""
    return hold_id.int >> 80
