"""The database of the measured gateway: accounts with API keys and more money than they can spend."""

import asyncio
import os

import asyncpg

from gptutor.database import migrations, pool
from gptutor.money.amounts import parse_roubles
from gptutor.money.bookings import Bookings
from gptutor.money.keyring import KeyRing
from gptutor.money.users import UserRepository
from gptutor.money.vault import Vault


async def prepare_database(url: str, accounts: int) -> list[str]:
    """Migrates the database, creates funded accounts, and returns their API keys."""
    await migrations.migrate(url)
    keys = []
    async with pool.open_database(url) as database:
        for _ in range(accounts):
            user = await UserRepository(database).create("bench")
            await Bookings(database).book(user.account_id, "topup", parse_roubles("1000000"))
            key, _ = await KeyRing(database, Vault([os.urandom(32)])).issue(user.account_id)
            keys.append(key)
    return keys


def count_commits(url: str) -> int:
    """How many transactions the server has committed."""

    async def query() -> int:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute("SELECT pg_stat_force_next_flush()")
            commits: int = await connection.fetchval("SELECT sum(xact_commit)::bigint FROM pg_stat_database")
            return commits
        finally:
            await connection.close()

    return asyncio.run(query())
