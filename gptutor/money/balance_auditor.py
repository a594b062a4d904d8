"""The balance auditor of a running service: it logs accounts whose row was changed without the ledger, such as by hand.

`gptutor verify` checks all invariants over all rows, and takes long. The auditor checks only accounts that were written since its
previous check: PostgreSQL marks each version of a row with the transaction that wrote it, so that a change by hand is found like
any other. Changes that were made while no process was running are left to `gptutor verify`.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from typing import Any

from gptutor.database.alert_book import AlertBook
from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import Database
from gptutor.money.amounts import roubles
from gptutor.money.invariants import Finding
from gptutor.telemetry.alerts import ALERTS
from gptutor.telemetry.metrics import INCONSISTENT_ACCOUNTS

LOGGER = logging.getLogger("gptutor.balance_auditor")
ACCOUNTS_PER_QUERY = 500
NAMED_MAX = 5
"""Accounts that an alert names."""
AUDITED = frozenset({"01_held_is_the_sum_of_open_holds", "02_balance_is_the_sum_of_entries"})
"""The invariants that the auditor checks."""


class BalanceAuditor:
    """Checks every `every_s` seconds."""

    def __init__(self, database: Database, every_s: float) -> None:
        self._database = database
        self._every_s = every_s
        self._oldest_transaction: str | None = None
        """The oldest transaction that was running at the previous check: it or a later one wrote every row changed since then."""
        self._broken: set[int] = set()

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            try:
                await self.check_once()
            except DatabaseUnavailable as error:
                LOGGER.warning("The balance auditor waits: %s", error)
            except Exception:
                LOGGER.exception("The balance auditor failed, and continues")
            await asyncio.sleep(self._every_s)

    async def check_once(self) -> set[int]:
        """Returns the accounts that are broken now. The first call only notes where to begin. Raises DatabaseUnavailable."""
        row = await self._database.fetchrow("oldest_transaction")
        oldest_transaction: str = row["xid"] if row is not None else ""
        if self._oldest_transaction is not None:
            written = await self._database.fetch("list_accounts_written_since", self._oldest_transaction)
            account_ids = sorted(self._broken.union(row["account_id"] for row in written))
            broken: set[int] = set()
            for start in range(0, len(account_ids), ACCOUNTS_PER_QUERY):
                found = await self._database.fetch("check_accounts", account_ids[start : start + ACCOUNTS_PER_QUERY])
                for row in found:
                    broken.add(row["account_id"])
                    if row["account_id"] not in self._broken:
                        _log_broken_account(row)
            self._broken = broken
            INCONSISTENT_ACCOUNTS.set(len(broken))
            some = ", ".join(map(str, sorted(broken)[:NAMED_MAX]))
            ALERTS.report("books_broken", f"{len(broken)} accounts do not match their ledger, such as {some}" if broken else None)
        self._oldest_transaction = oldest_transaction
        return self._broken


async def end_alert(database: Database, findings: Iterable[Finding]) -> None:
    """To be called after all invariants were checked: the alert is over if no account is broken.

    A process that was started after an account was broken does not know of it, and cannot tell that it is right again. One that
    finds an account broken records the alert again.
    """
    if {finding.invariant.name for finding in findings if not finding.rows} >= AUDITED:
        with contextlib.suppress(DatabaseUnavailable):  # such as a replica, which cannot be written to
            await AlertBook(database).end("books_broken")


def _log_broken_account(row: Any) -> None:
    LOGGER.error(
        "An account does not match its ledger: balance %s, sum of its entries %s; held %s, sum of its open holds %s. "
        "Run: gptutor verify",
        *(roubles(int(row[name])) for name in ("balance_nano", "entries_nano", "held_nano", "open_holds_nano")),
        extra={"type": "balance_audit", "userId": str(row["account_id"])},
    )
