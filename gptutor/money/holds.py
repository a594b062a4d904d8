"""The words of a hold's life: what is asked for, what is granted, and how it can be refused."""

import random
import time
import uuid
from decimal import Decimal
from typing import NewType

import msgspec
from asyncpg.pgproto.pgproto import UUID  # as rows have it: hashed, compared and spelled without Python's help

from gptutor.money.amounts import AccountId, Nano
from gptutor.money.keys import KeyClaim
from gptutor.money.pricing import Ceiling

HoldId = NewType("HoldId", uuid.UUID)


class NotHeld(Exception):
    """Nothing was reserved, for one of the reasons below."""


class UnknownKey(NotHeld):
    """The key is unknown or revoked, or its account is inactive: the statement does not say which."""


class InsufficientFunds(NotHeld):
    """Less is available than the request may cost, or than the minimum balance."""


class RateLimited(NotHeld):
    """The account, or (`of_key`) the key, has had all the requests that it may have in this minute."""

    def __init__(self, *, of_key: bool) -> None:
        super().__init__()
        self.of_key = of_key


class TooManyAtOnce(NotHeld):
    """The account has as many requests under way as it may have."""


class KeyCapReached(NotHeld):
    """The request may cost more than is left of what its key may spend."""


class RepeatedRequest(NotHeld):
    """The idempotency key was used within a day, by the request named here; `same_body` tells whether it asked the same."""

    def __init__(self, request_id: str, *, same_body: bool) -> None:
        super().__init__(request_id)
        self.request_id = request_id
        self.same_body = same_body


class HoldRequest(msgspec.Struct, frozen=True):
    """Who asks for how much, and what for. `body_hash` is SHA-256, and given with an idempotency key."""

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


class Hold(msgspec.Struct, frozen=True):
    account_id: AccountId
    hold_id: HoldId
    amount: Nano
    available_before: Nano
    """To this key: what the account had, or what was left under the key's cap."""
    minute_requests: int
    """How many requests the account has had in this minute, this one included."""


class Settlement(msgspec.Struct, frozen=True):
    """A finished request: what it costs, by OpenRouter's word."""

    account_id: AccountId
    hold_id: HoldId
    charge: Nano
    cost_usd: Decimal
    generation_id: str | None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Release(msgspec.Struct, frozen=True):
    """A hold to be freed: nothing was bought, or (`unresolved`) nobody ever learnt whether."""

    account_id: AccountId
    hold_id: HoldId
    unresolved: bool = False


class HandOver(msgspec.Struct, frozen=True):
    """A hold to be left to recovery, with what is known of it."""

    account_id: AccountId
    hold_id: HoldId
    generation_id: str | None


def new_id() -> HoldId:
    """A UUIDv7 (RFC 9562): its time comes first, so that new rows are neighbours in the index."""
    milliseconds = time.time_ns() // 1_000_000
    bits = milliseconds << 80 | random.getrandbits(80)  # nobody who guesses one could do anything with it
    bits = bits & ~(0xF << 76) | 0x7 << 76
    bits = bits & ~(0x3 << 62) | 0x2 << 62
    return HoldId(UUID(bits.to_bytes(16)))
