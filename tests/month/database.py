"""The service's PostgreSQL: it can crash, be dumped, and be replaced by a dump."""

import subprocess
from pathlib import Path

import asyncpg

from tests.chaos.processes import Postgres
from tests.month.waiting import require

NAME = "month"


class Database:
    """A database of its own on the server, whose default one is its template: that may be migrated already."""

    def __init__(self, server: Postgres) -> None:
        self._server = server
        self.url = server.url.replace("/postgres?", f"/{NAME}?")

    async def create(self) -> None:
        await self._on_server(f"CREATE DATABASE {NAME} TEMPLATE postgres")

    async def is_migrated(self) -> bool:
        connection = await asyncpg.connect(self.url)
        try:
            return bool(await connection.fetchval("SELECT to_regclass('schema_migrations') IS NOT NULL"))
        finally:
            await connection.close()

    def crash(self) -> None:
        self._server.crash()

    def start(self) -> None:
        self._server.start()

    def dump(self, file: Path) -> None:
        self._run("pg_dump", "--format=custom", f"--file={file}", self.url)

    async def lose(self) -> None:
        await self._on_server(f"DROP DATABASE {NAME} WITH (FORCE)", f"CREATE DATABASE {NAME} TEMPLATE template0")

    def restore(self, file: Path) -> None:
        self._run("pg_restore", "--no-owner", f"--dbname={self.url}", str(file))

    async def _on_server(self, *statements: str) -> None:
        connection = await asyncpg.connect(self._server.url)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run([self._server.programs / program, *arguments], text=True, capture_output=True, check=False)
        require(done.returncode == 0, f"{program} failed: {done.stderr}")
