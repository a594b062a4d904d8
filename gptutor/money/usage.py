"""What an account spent, exactly: the typed functions of `sql/queries/usage.sql` (contract D5).

Every statement reads one account, and none sums the ledger: the time of a statement does not grow with the ledger.
"""

import datetime
import uuid
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, NamedTuple

from gptutor.database.pool import Database
from gptutor.money.amounts import AccountId, Nano
from gptutor.money.bookings import EntryKind
from gptutor.money.users import NoSuchUser

State = Literal["open", "awaiting_evidence", "settled", "released", "unresolved"]
"""The state of a request. open: it is running; awaiting_evidence: recovery is looking up its cost; settled: it was charged;
released: it bought nothing; unresolved: no evidence of a purchase was found, so it was not charged."""


class NoSuchRequest(LookupError):
    """No request of this account has this id."""


class Cursor(NamedTuple):
    """A position in the list of entries, which is ordered by time, then by id."""

    created_at: datetime.datetime
    entry_id: uuid.UUID


@dataclass(frozen=True, slots=True)
class Credits:
    """An account's balance and held amount at one moment; `spent` is the sum of its charges."""

    balance: Nano
    held: Nano
    spent: Nano


@dataclass(frozen=True, slots=True)
class UsageEntry:
    """A ledger entry as the user sees it. The fields after `amount` are for charges only, and some may be None."""

    entry_id: uuid.UUID
    created_at: datetime.datetime
    kind: EntryKind
    reason: str
    amount: Nano
    model: str | None
    cost_usd: Decimal | None
    rub_per_usd: Decimal | None
    prompt_tokens: int | None
    completion_tokens: int | None
    generation_id: str | None
    request_id: str | None
    key: str | None
    """The display prefix of the API key."""

    @property
    def place(self) -> Cursor:
        return Cursor(self.created_at, self.entry_id)


@dataclass(frozen=True, slots=True)
class Total:
    """A sum of charges; `day` or `model` is None if the sum is over all days or models. Unknown token counts are left out."""

    day: datetime.date | None
    model: str | None
    requests: int
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: Decimal
    charge: Nano


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request. `charge` and `cost_usd` are None until it is charged; `held` is the amount of its open hold."""

    hold_id: uuid.UUID
    request_id: str
    generation_id: str | None
    model: str
    state: State
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: Decimal | None
    rub_per_usd: Decimal
    charge: Nano | None
    held: Nano
    created_at: datetime.datetime
    closed_at: datetime.datetime | None
    key: str | None


class Usage:
    """Every method may raise DatabaseUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def credits(self, account_id: AccountId) -> Credits:
        """Raises NoSuchUser."""
        row = await self._database.fetchrow("find_credits", account_id)
        if row is None:
            raise NoSuchUser
        return Credits(Nano(row["balance_nano"]), Nano(row["held_nano"]), Nano(row["spent_nano"]))

    async def entries(
        self, account_id: AccountId, *, before: Cursor, since: datetime.datetime, limit: int, model: str | None
    ) -> list[UsageEntry]:
        """The entries before the position `before` and not older than `since`, newest first."""
        page = (account_id, before.created_at, before.entry_id, since, limit)
        if model is None:
            rows = await self._database.fetch("list_usage", *page)
        else:
            rows = await self._database.fetch("list_usage_of_model", *page, model)
        return [
            UsageEntry(
                entry_id=row["entry_id"],
                created_at=row["created_at"],
                kind=row["kind"],
                reason=row["reason"],
                amount=Nano(row["amount_nano"]),
                model=row["model"],
                cost_usd=row["cost_usd"],
                rub_per_usd=row["rub_per_usd"],
                prompt_tokens=row["prompt_tokens"],
                completion_tokens=row["completion_tokens"],
                generation_id=row["generation_id"],
                request_id=row["request_id"],
                key=row["key"],
            )
            for row in rows
        ]

    async def totals(
        self, account_id: AccountId, first: datetime.date, last: datetime.date, *, by_day: bool, by_model: bool
    ) -> list[Total]:
        """The charges of the UTC days from `first` to `last`; newest day first, then the most expensive model."""
        return [
            Total(
                day=row["day"],
                model=row["model"],
                requests=row["requests"],
                prompt_tokens=_token_count(row["prompt_tokens"]),
                completion_tokens=_token_count(row["completion_tokens"]),
                cost_usd=row["cost_usd"],
                charge=Nano(row["charge_nano"]),
            )
            for row in await self._database.fetch("sum_usage", account_id, first, last, by_day, by_model)
        ]

    async def request(self, account_id: AccountId, request_or_generation_id: str) -> RequestRecord:
        """The newest request with this request id or generation id. Raises NoSuchRequest."""
        row = await self._database.fetchrow("find_request", account_id, request_or_generation_id)
        if row is None:
            raise NoSuchRequest
        return RequestRecord(
            hold_id=row["hold_id"],
            request_id=row["request_id"],
            generation_id=row["generation_id"],
            model=row["model"],
            state=row["state"],
            prompt_tokens=row["prompt_tokens"],
            completion_tokens=row["completion_tokens"],
            cost_usd=row["cost_usd"],
            rub_per_usd=row["rub_per_usd"],
            charge=None if row["charge_nano"] is None else Nano(row["charge_nano"]),
            held=Nano(row["held_nano"]),
            created_at=row["created_at"],
            closed_at=row["closed_at"],
            key=row["key"],
        )


def _token_count(count: Decimal | None) -> int | None:
    return None if count is None else int(count)
