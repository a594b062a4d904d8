"""The administrators' API on a Unix socket, and one administrator, anna, who calls it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from gptutor.admin.app import build_admin
from gptutor.config import schema
from gptutor.server.serve import admin_listening
from gptutor.telemetry.logs import LoggerService
from tests.support.gateway import SECRET

TOKEN = "annas-token-of-thirty-two-characters-or-more"


@dataclass
class Administrator:
    session: aiohttp.ClientSession

    async def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """The status, and the document; of an error, its text."""
        async with self.session.request(method, f"http://admin{path}", json=body) as response:
            document = await response.json(content_type=None)
            return response.status, document if response.status < 400 else document["error"]

    async def data(self, path: str) -> Any:
        status, document = await self.request("GET", path)
        assert status == 200, document
        return document["data"]


@asynccontextmanager
async def administrator_of(config: schema.Config) -> AsyncIterator[Administrator]:
    """`config` with an administrators' listener below `paths.data`."""
    config.paths.logs.mkdir(exist_ok=True)
    config.paths.data.mkdir(exist_ok=True)
    socket = config.paths.data / "admin.socket"
    config = msgspec.structs.replace(config, admin=schema.AdminSettings(socket=str(socket), token=f"anna:{TOKEN}"))
    async with (
        admin_listening(build_admin(config, log=LoggerService(), secrets=[SECRET]), config),
        aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(socket)), headers={"Authorization": f"Bearer {TOKEN}"}
        ) as session,
    ):
        yield Administrator(session)
