"""The administrators' application on a Unix socket, and requests to it."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from gptutor.admin.app import build_admin
from gptutor.config import schema
from gptutor.database.pool import Database
from gptutor.server.serve import admin_listening
from gptutor.telemetry.log_writer import logging_to
from gptutor.telemetry.logs import LoggerService
from tests.support.gateway import SECRET, config_for

TOKEN = "a-token-of-thirty-two-characters-or-more"
ANNAS = "annas-token-of-thirty-two-characters-or-more"


@dataclass
class Admin:
    session: aiohttp.ClientSession
    database: Database
    logs: Path

    async def request(self, method: str, path: str, body: Any = None, *, token: str = ANNAS) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {token}"}
        async with self.session.request(method, f"http://admin{path}", json=body, headers=headers) as response:
            assert response.headers["X-Request-ID"]
            document = await response.json(content_type=None)
            if response.status >= 400:
                assert list(document) == ["error"]
                return response.status, response.headers["X-Error-Code"]
            return response.status, document["data"]

    async def document(self, path: str) -> Any:
        """The whole of a successful response, with what stands beside `data`."""
        async with self.session.get(f"http://admin{path}", headers={"Authorization": f"Bearer {ANNAS}"}) as response:
            assert response.status == 200
            return await response.json()

    def audit(self) -> list[dict[str, Any]]:
        (path,) = self.logs.glob("combined-*.log")
        return [line for line in map(json.loads, path.read_text().splitlines()) if line.get("type") == "audit"]

    async def audited(self, count: int) -> list[dict[str, Any]]:
        for _ in range(100):
            if len(lines := self.audit()) >= count:
                break
            await asyncio.sleep(0.02)
        return lines


@asynccontextmanager
async def admin_on(
    database_url: str, database: Database, directory: Path, base_url: str = "http://127.0.0.1:9"
) -> AsyncIterator[Admin]:
    """With the tokens TOKEN and ANNAS. Afterwards neither they nor a key are in the log."""
    socket, lines = directory / "admin.socket", directory / "lines"
    plain = config_for(database_url, base_url, directory)
    config = msgspec.structs.replace(plain, admin=schema.AdminSettings(socket=str(socket), token=f"{TOKEN} anna:{ANNAS}"))
    config.paths.logs.mkdir()
    with logging_to(lines, level="error", retention_days=1, stdout=False):
        async with (
            admin_listening(build_admin(config, log=LoggerService(), secrets=[SECRET]), config),
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as session,
        ):
            assert socket.stat().st_mode & 0o777 == 0o660
            yield Admin(session, database, lines)
    assert not socket.exists()
    text = "".join(path.read_text() for path in lines.iterdir())
    assert TOKEN not in text
    assert ANNAS not in text
    assert not re.search(r"sk-user-\d+-\w{5}", text)
