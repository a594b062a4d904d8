"""The watch over the books while the service runs: an account that was changed past the ledger is told of at the next look.

`gptutor verify` proves all laws over all rows, and takes its time. This looks only at accounts that were written since the look
before: PostgreSQL marks each version of a row with the transaction that wrote it, so a change by hand is seen like any other.
What was changed while no process ran is for `gptutor verify`.
"""

import asyncio
import logging
from typing import Any

from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import Database
from gptutor.money.amounts import roubles
from gptutor.telemetry.metrics import INCONSISTENT_ACCOUNTS

LOGGER = logging.getLogger("gptutor.watch")
AT_ONCE = 500


class BalanceAuditor:
    """Looks every `every_s` seconds."""

    def __init__(self, database: Database, every_s: float) -> None:
        self._database = database
        self._every_s = every_s
        self._mark: str | None = None
        self._broken: set[int] = set()

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                await self.look()
            except DatabaseUnavailable as error:
                LOGGER.warning("The watch over the books waits: %s", error)
            except Exception:
                LOGGER.exception("The watch over the books failed, and goes on")
            await asyncio.sleep(self._every_s)

    async def look(self) -> set[int]:
        """Looks once; gives the accounts that are broken now. The first look only begins. Raises DatabaseUnavailable."""
        row = await self._database.fetchrow("oldest_transaction")
        mark: str = row["xid"] if row is not None else ""
        if self._mark is not None:
            written = await self._database.fetch("list_accounts_written_since", self._mark)
            doubtful = sorted(self._broken.union(row["account_id"] for row in written))
            broken: set[int] = set()
            for start in range(0, len(doubtful), AT_ONCE):
                found = await self._database.fetch("check_accounts", doubtful[start : start + AT_ONCE])
                for row in found:
                    broken.add(row["account_id"])
                    if row["account_id"] not in self._broken:
                        _tell(row)
            self._broken = broken
            INCONSISTENT_ACCOUNTS.set(len(broken))
        self._mark = mark
        return self._broken


def _tell(row: Any) -> None:
    LOGGER.error(
        "An account is not what the ledger says of it: balance %s, by its entries %s; reserved %s, by its open holds %s. "
        "See: gptutor verify",
        *(roubles(int(row[name])) for name in ("balance_nano", "entries_nano", "held_nano", "open_holds_nano")),
        extra={"type": "watch", "userId": str(row["account_id"])},
    )
