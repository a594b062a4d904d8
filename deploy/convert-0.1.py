"""Converts the service's database from the schema of GPTutor 0.1 to that of 0.2, and migrates it: `make convert-0.1`.

For the database of DATABASE_URL and for the embedded one. Stop the service and make a backup first. The conversion itself is
convert-0.1.sql, which psql can run as well.
"""

import asyncio
from pathlib import Path

import asyncpg

from gptutor.config.load import load
from gptutor.database.migrations import migrate
from gptutor.server.serve import resolved_database


async def convert(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
    finally:
        await connection.close()
    await migrate(url)


if __name__ == "__main__":
    with resolved_database(load()) as settings:
        asyncio.run(convert(settings.database.url))
    print("The database is converted. `gptutor verify` checks it.")
