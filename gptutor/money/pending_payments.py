"""Payments whose end is not known yet: the typed functions of `sql/queries/pending_payments.sql`."""

from dataclasses import dataclass

from gptutor.database.pool import Database
from gptutor.money.amounts import AccountId


@dataclass(frozen=True, slots=True)
class DuePayment:
    """A payment to be looked up now. `is_last_lookup`: it is so old that it is given up if it has not ended."""

    payment_id: str
    account_id: AccountId
    is_last_lookup: bool


class PendingPayments:
    """A payment is looked up after `interval_s`, 2, 4 … times that, at most `interval_max_s`, until it is `give_up_s` old."""

    def __init__(self, database: Database, *, interval_s: float, interval_max_s: float, give_up_s: float) -> None:
        self._database = database
        self._interval_s = interval_s
        self._interval_max_s = interval_max_s
        self._give_up_s = give_up_s

    async def remember(self, account_id: AccountId, payment_id: str) -> None:
        """Does nothing if the payment is remembered, or there is no such account."""
        await self._database.fetch("remember_payment", account_id, payment_id, self._interval_s)

    async def count(self, account_id: AccountId) -> int:
        """How many payments of the account have not ended."""
        (row,) = await self._database.fetch("count_pending_payments", account_id)
        return int(row["payments"])

    async def contains(self, payment_id: str) -> bool:
        return await self._database.fetchrow("find_pending_payment", payment_id) is not None

    async def claim(self) -> DuePayment | None:
        """A payment that is due, which no other process gets before its next look-up is due. None: no payment is due."""
        row = await self._database.fetchrow("claim_due_payment", self._interval_s, self._interval_max_s, self._give_up_s)
        return None if row is None else DuePayment(row["payment_id"], AccountId(row["account_id"]), row["is_last_lookup"])

    async def forget(self, payment_id: str) -> None:
        await self._database.fetch("forget_payment", payment_id)
