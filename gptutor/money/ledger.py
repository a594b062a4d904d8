"""The ledger's doors: hold → settle | release, and the bookings of people.

A hold is committed before anything is bought, and closed once: by a settlement with the exact charge, or by a release where
nothing was bought. Both are idempotent by the hold's id, so that repeating them after a lost acknowledgement is always safe.
"""

import datetime
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, NewType

from gptutor.database import ConstraintViolated, Database
from gptutor.money.amounts import AccountId, Nano
from gptutor.money.keys import KeyClaim
from gptutor.money.pricing import Ceiling
from gptutor.money.users import User, user_of

HoldId = NewType("HoldId", uuid.UUID)
Outcome = Literal["settled", "settled_late", "already", "no_hold"]
EntryKind = Literal["charge", "topup", "refund", "adjustment", "bonus"]

# The other leg of each booking: whose money moved into or out of the account.
CONTRA: dict[str, str] = {"topup": "payments", "refund": "payments", "adjustment": "corrections", "bonus": "goodwill"}


class UnknownKey(Exception):
    """The key is unknown or revoked, or its account is inactive: the statement does not say which."""


class InsufficientFunds(Exception):
    """Less is available than the request may cost, or than the minimum balance."""


class AlreadyBooked(Exception):
    """An entry with this reference exists: the booking was made before, and is not repeated."""


@dataclass(frozen=True, slots=True)
class Hold:
    account_id: AccountId
    hold_id: HoldId
    amount: Nano
    available_before: Nano


@dataclass(frozen=True, slots=True)
class Settlement:
    """A finished request: what it costs, by OpenRouter's word."""

    account_id: AccountId
    hold_id: HoldId
    charge: Nano
    cost_usd: Decimal
    generation_id: str | None


@dataclass(frozen=True, slots=True)
class Entry:
    entry_id: uuid.UUID
    kind: EntryKind
    amount: Nano
    contra: str
    reason: str
    reference: str | None
    model: str | None
    generation_id: str | None
    cost_usd: Decimal | None
    rub_per_usd: Decimal | None
    created_at: datetime.datetime


class Ledger:
    def __init__(self, database: Database, *, rub_per_usd: Decimal = Decimal(0), hold_ttl_s: float = 0) -> None:
        self._database = database
        self._rub_per_usd = rub_per_usd
        self._hold_ttl_s = hold_ttl_s

    async def hold_funds(self, claim: KeyClaim, hold_id: HoldId, ceiling: Ceiling, *, model: str, request_id: str) -> Hold:
        """Authenticates the key and reserves the ceiling, in one statement. Raises UnknownKey, InsufficientFunds."""
        row = await self._database.fetchrow(
            "hold_funds",
            claim.account_id,
            claim.key_hash,
            hold_id,
            ceiling.most,
            ceiling.least,
            self._rub_per_usd,
            model,
            request_id,
            self._hold_ttl_s,
        )
        if row is None:
            raise UnknownKey
        if row["amount_nano"] is None:
            raise InsufficientFunds
        return Hold(claim.account_id, hold_id, Nano(row["amount_nano"]), Nano(row["available_nano"]))

    async def settle_holds(self, settlements: Sequence[Settlement]) -> dict[HoldId, Outcome]:
        """Books the charges and frees the holds; a charge above its hold is booked in full (contract C5)."""
        rows = await self._database.fetch(
            "settle_holds",
            [settlement.account_id for settlement in settlements],
            [settlement.hold_id for settlement in settlements],
            [settlement.charge for settlement in settlements],
            [settlement.cost_usd for settlement in settlements],
            [settlement.generation_id for settlement in settlements],
        )
        return {row["hold_id"]: row["outcome"] for row in rows}

    async def release_holds(self, holds: Sequence[Hold]) -> None:
        """Frees the holds of requests that bought nothing; one that is closed already stays as it is."""
        await self._database.fetch("release_holds", [hold.account_id for hold in holds], [hold.hold_id for hold in holds])

    async def book(
        self, account_id: AccountId, kind: EntryKind, amount: Nano, *, reason: str = "", reference: str | None = None
    ) -> User:
        """An entry by a person or a payment. Raises NoSuchUser, AlreadyBooked."""
        try:
            row = await self._database.fetchrow("book_entry", account_id, new_id(), kind, amount, CONTRA[kind], reason, reference)
        except ConstraintViolated as violation:
            if violation.name == "ledger_reference_is_booked_once":
                raise AlreadyBooked(reference) from violation
            raise
        return user_of(row)

    async def entries(self, account_id: AccountId, limit: int) -> list[Entry]:
        """The newest entries, newest first."""
        return [
            Entry(
                entry_id=row["entry_id"],
                kind=row["kind"],
                amount=Nano(row["amount_nano"]),
                contra=row["contra"],
                reason=row["reason"],
                reference=row["reference"],
                model=row["model"],
                generation_id=row["generation_id"],
                cost_usd=row["cost_usd"],
                rub_per_usd=row["rub_per_usd"],
                created_at=row["created_at"],
            )
            for row in await self._database.fetch("list_entries", account_id, limit)
        ]


def new_id() -> HoldId:
    """A UUIDv7 (RFC 9562): its time comes first, so that new rows are neighbours in the index."""
    milliseconds = time.time_ns() // 1_000_000
    bits = milliseconds << 80 | int.from_bytes(os.urandom(10), "big")
    bits = bits & ~(0xF << 76) | 0x7 << 76
    bits = bits & ~(0x3 << 62) | 0x2 << 62
    return HoldId(uuid.UUID(int=bits))
