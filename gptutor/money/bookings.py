"""Entries by people and payments (contract C11): every change of a balance that is not a charge, and the reading of all
entries."""

import datetime
import uuid
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from gptutor.database import ConstraintViolated, Database
from gptutor.money.amounts import AccountId, Nano
from gptutor.money.holds import new_id
from gptutor.money.users import User, user_of

EntryKind = Literal["charge", "topup", "refund", "adjustment", "bonus"]

# The other leg of each booking: whose money moved into or out of the account.
CONTRA: dict[str, str] = {"topup": "payments", "refund": "payments", "adjustment": "corrections", "bonus": "goodwill"}


class AlreadyBooked(Exception):
    """An entry with this reference exists: the booking was made before, and is not repeated."""


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


class Bookings:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def book(
        self, account_id: AccountId, kind: EntryKind, amount: Nano, *, reason: str = "", reference: str | None = None
    ) -> User:
        """Raises NoSuchUser, AlreadyBooked: a reference names one payment, whoever's account it was booked on."""
        if reference is not None and await self._database.fetchrow("find_reference", reference):
            raise AlreadyBooked(reference)
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
