"""The database that the gateway is measured on: accounts with keys and more money than they can spend."""

import asyncio
import os

import asyncpg

from gptutor.database import migrations, pool
from gptutor.money.amounts import parse_roubles
from gptutor.money.bookings import Bookings
from gptutor.money.keyring import KeyRing
from gptutor.money.users import UserRepository
from gptutor.money.vault import Vault


async def prepared(url: str, accounts: int) -> list[str]:
    """Migrates the database, and gives the keys of new accounts."""
    await migrations.migrate(url)
    keys = []
    async with pool.open_database(url) as books:
        for _ in range(accounts):
            user = await UserRepository(books).create("bench")
            await Bookings(books).book(user.account_id, "topup", parse_roubles("1000000"))
            key, _ = await KeyRing(books, Vault([os.urandom(32)])).issue(user.account_id)
            keys.append(key)
    return keys


def commits(url: str) -> int:
    """How many transactions the database has committed."""

    async def ask() -> int:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute("SELECT pg_stat_force_next_flush()")
            found: int = await connection.fetchval("SELECT sum(xact_commit)::bigint FROM pg_stat_database")
            return found
        finally:
            await connection.close()

    return asyncio.run(ask())
