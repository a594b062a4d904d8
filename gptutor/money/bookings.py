"""Ledger entries made by administrators and payments (contract C11): every change of a balance except charges. Also reads all
entries."""

import asyncio
import datetime
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, TypeVar

from gptutor.database.errors import ConstraintViolated, DatabaseUnavailable
from gptutor.database.pool import Database, Row
from gptutor.money.amounts import NANO_PER_RUB, AccountId, InvalidAmount, Nano
from gptutor.money.holds import Evidence, new_id
from gptutor.money.users import NoSuchUser, User, UserRepository
from gptutor.telemetry.metrics import BOOKINGS_ROUBLES

if TYPE_CHECKING:
    from gptutor.money.usage import Cursor

PAUSES_S = (0.2, 1.0)
Result = TypeVar("Result")
EntryKind = Literal["charge", "topup", "refund", "adjustment", "bonus"]

# The contra account of each kind of entry (double entry): where the money came from, or went to.
CONTRA: dict[str, str] = {"topup": "payments", "refund": "payments", "adjustment": "corrections", "bonus": "goodwill"}

# A position that every entry is before.
END_OF_LEDGER = (datetime.datetime.max.replace(tzinfo=datetime.UTC), uuid.UUID(int=2**128 - 1))


class AlreadyBooked(Exception):
    """An entry with this reference exists already; nothing was booked."""


class Uncovered(Exception):
    """The available amount is less than the amount to take."""


@dataclass(frozen=True, slots=True)
class Booking:
    """The parts of a ledger entry that identify a booking."""

    account_id: AccountId
    entry_id: uuid.UUID
    kind: EntryKind
    amount: Nano
    created_at: datetime.datetime


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    entry_id: uuid.UUID
    kind: EntryKind
    amount: Nano
    contra: str
    reason: str
    reference: str | None
    booked_by: str | None
    """None for charges, and for entries that are older than the column."""
    model: str | None
    generation_id: str | None
    request_id: str | None
    key: str | None
    """The display prefix of the API key."""
    cost_usd: Decimal | None
    rub_per_usd: Decimal | None
    prompt_tokens: int | None
    completion_tokens: int | None
    evidence: Evidence | None
    created_at: datetime.datetime


class Bookings:
    """`booked_by` stands on the entries that it books: see Bookkeeper."""

    def __init__(self, database: Database, booked_by: str | None = None) -> None:
        self._database = database
        self._booked_by = booked_by
        self._users = UserRepository(database)

    async def book(
        self,
        account_id: AccountId,
        kind: EntryKind,
        amount: Nano,
        *,
        reason: str = "",
        reference: str | None = None,
        covered: bool = False,
    ) -> Booking:
        """Books an entry. With `covered`, an amount that is taken must be available.

        Raises NoSuchUser, Uncovered, InvalidAmount, and AlreadyBooked: a reference is booked once, across all accounts.
        """
        booking, is_new = await self._book(account_id, kind, amount, reason=reason, reference=reference, covered=covered)
        if not is_new:
            raise AlreadyBooked(reference)
        return booking

    async def user(self, account_id: AccountId) -> User:
        """The account after a booking. The read is retried, so that a failed read is not mistaken for a failed booking."""
        return await retry_lost_response(lambda: self._users.find(account_id))

    async def book_once(
        self, account_id: AccountId, kind: EntryKind, amount: Nano, *, reference: str, reason: str = ""
    ) -> tuple[Booking, bool]:
        """The entry with this reference, created if there is none; and whether it is new.

        Raises NoSuchUser, InvalidAmount, and AlreadyBooked if the existing entry has another account, kind or amount.
        """
        booking, is_new = await self._book(account_id, kind, amount, reason=reason, reference=reference)
        if (booking.account_id, booking.kind, booking.amount) != (account_id, kind, amount):
            raise AlreadyBooked(reference)
        return booking, is_new

    async def _book(
        self,
        account_id: AccountId,
        kind: EntryKind,
        amount: Nano,
        *,
        reason: str,
        reference: str | None,
        covered: bool = False,
    ) -> tuple[Booking, bool]:
        entry_id = new_id()
        try:
            row = await retry_lost_response(
                lambda: self._database.fetchrow(
                    "book_entry",
                    account_id,
                    entry_id,
                    kind,
                    amount,
                    CONTRA[kind],
                    reason,
                    reference,
                    self._booked_by,
                    covered,
                )
            )
        except ConstraintViolated as violation:
            if violation.name == "ledger_reference_is_booked_once":  # booked by other means than book_entry
                raise AlreadyBooked(reference) from violation
            if violation.name == "balance_is_bounded":
                raise InvalidAmount("the balance would become larger than any that can be kept") from violation
            raise
        if row is None:
            raise NoSuchUser
        if row["outcome"] == "insufficient":
            raise Uncovered
        booking = booking_of(row)
        is_new = row["outcome"] == "booked" or booking.entry_id == entry_id
        if is_new:
            BOOKINGS_ROUBLES.add((kind, "to" if amount > 0 else "from"), abs(amount) / NANO_PER_RUB)
        return booking, is_new

    async def find(self, reference: str) -> Booking | None:
        """The entry with this reference."""
        row = await self._database.fetchrow("find_reference", reference)
        return None if row is None else booking_of(row)

    async def entries(self, account_id: AccountId, limit: int, *, before: "Cursor | None" = None) -> list[LedgerEntry]:
        """A page of entries, newest first: those before the position `before`, or the newest."""
        created_at, entry_id = before or END_OF_LEDGER
        rows = await self._database.fetch("list_entries", account_id, created_at, entry_id, limit)
        return [entry_of(row) for row in rows]

    async def export(
        self, first: datetime.date | None, last: datetime.date | None, account_id: AccountId | None
    ) -> AsyncGenerator[list[tuple[AccountId, LedgerEntry]], None]:
        """The entries from the UTC day `first` to `last`, both included, by account and time, in pages of one snapshot."""
        async for rows in self._database.pages("export_entries", first, last, account_id):
            yield [(AccountId(row["account_id"]), entry_of(row)) for row in rows]


async def retry_lost_response(run: Callable[[], Awaitable[Result]]) -> Result:
    """Retries when the response was lost: after an error an administrator would book a second time by hand."""
    for pause_s in PAUSES_S:
        try:
            return await run()
        except DatabaseUnavailable:
            await asyncio.sleep(pause_s)
    return await run()


def booking_of(row: Row) -> Booking:
    return Booking(AccountId(row["account_id"]), row["entry_id"], row["kind"], Nano(row["amount_nano"]), row["created_at"])


def entry_of(row: Row) -> LedgerEntry:
    return LedgerEntry(
        entry_id=row["entry_id"],
        kind=row["kind"],
        amount=Nano(row["amount_nano"]),
        contra=row["contra"],
        reason=row["reason"],
        reference=row["reference"],
        booked_by=row["booked_by"],
        model=row["model"],
        generation_id=row["generation_id"],
        request_id=row["request_id"],
        key=row["key_prefix"],
        cost_usd=row["cost_usd"],
        rub_per_usd=row["rub_per_usd"],
        prompt_tokens=row["prompt_tokens"],
        completion_tokens=row["completion_tokens"],
        evidence=row["evidence"],
        created_at=row["created_at"],
    )
