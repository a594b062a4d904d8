"""The gateway on a real socket with the simulator behind it, and its clients."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
from aiohttp import web

from gptutor.app import build_app
from gptutor.config import schema
from gptutor.database import migrations, pool
from gptutor.http.app_keys import READINESS, SERVICES
from gptutor.money.amounts import AccountId, parse_roubles, roubles
from gptutor.money.bookings import Bookings
from gptutor.money.keyring import KeyRing
from gptutor.money.users import User, UserRepository
from gptutor.money.vault import Vault
from gptutor.server.serve import listening
from gptutor.simulator.server import Simulator
from gptutor.telemetry.logs import LoggerService

SECRET = bytes(range(32))
VAULT = Vault([SECRET])
MODEL = "google/gemini-2.5-flash-lite"


@dataclass
class Client:
    """A user with a key: as a client sees them, and as the database does."""

    key: str
    account_id: AccountId
    database: pool.Database

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    async def user(self) -> User:
        return await UserRepository(self.database).find(self.account_id)

    async def balance(self) -> Decimal:
        return Decimal(roubles((await self.user()).balance))

    async def held(self) -> Decimal:
        return Decimal(roubles((await self.user()).held))


async def make_client(database: pool.Database, balance: str) -> Client:
    users = UserRepository(database)
    user = await users.create()
    if Decimal(balance):
        await Bookings(database).book(user.account_id, "topup", parse_roubles(balance))
    key, _ = await KeyRing(database, VAULT).issue(user.account_id)
    return Client(key, user.account_id, database)


@dataclass
class Gateway:
    """The service on a socket, with the simulator behind it."""

    url: str
    app: web.Application
    simulator: Simulator
    database: pool.Database
    session: aiohttp.ClientSession
    chat_url: str = field(init=False)

    def __post_init__(self) -> None:
        self.chat_url = f"{self.url}/v1/chat/completions"

    async def client(self, balance: str = "100") -> Client:
        return await make_client(self.database, balance)

    async def chat(self, client: Client, text: str = "Hello", **members: Any) -> tuple[aiohttp.ClientResponse, bytes]:
        """Sends a chat completion, and waits until its charge is settled."""
        body = {"messages": [{"role": "user", "content": text}], **members}
        async with self.session.post(self.chat_url, json=body, headers=client.headers) as response:
            document = await response.read()
        await self.idle()
        return response, document

    async def idle(self) -> None:
        """Waits until every request is settled, released or handed over."""
        async with asyncio.timeout(20):
            while len(self.app[SERVICES].in_flight):
                await asyncio.sleep(0.005)

    async def recovered(self, client: Client) -> None:
        """Waits until recovery has closed all that the client's requests left open."""
        await self.idle()
        async with asyncio.timeout(20):
            while await client.held():
                await asyncio.sleep(0.02)

    async def ready(self) -> None:
        async with asyncio.timeout(20):
            while self.app[READINESS].obstacle is not None:
                await asyncio.sleep(0.005)

    def billed_usd(self) -> Decimal:
        return self.simulator.billing.total_usd()


def config_for(database_url: str, base_url: str, directory: Path, tuned: dict[str, Any] | None = None) -> schema.Config:
    """The settings of a gateway under test: the defaults, with addresses of the test, a quick shutdown, and what the test tunes."""
    changed = tuned or {}
    return schema.Config(
        server=schema.ServerSettings(**{"port": 0, "shutdown_s": 1, "drain_s": 5, **changed.get("server", {})}),
        paths=schema.PathSettings(data=directory / "var", logs=directory / "logs"),
        database=schema.DatabaseSettings(url=database_url),
        openrouter=schema.OpenRouterSettings(base_url=base_url, api_key="sk-or-test", **changed.get("openrouter", {})),
        alerts=schema.AlertSettings(**changed.get("alerts", {})),
        billing=schema.BillingSettings(**changed.get("billing", {})),
        rate_limit=schema.RateLimitSettings(**changed.get("rate_limit", {})),
        errors=schema.ErrorSettings(**changed.get("errors", {})),
        vk=schema.VkSettings(**changed.get("vk", {})),
        relay=schema.RelaySettings(**changed.get("relay", {})),
        recovery=schema.RecoverySettings(**{"poll_s": 0.05, **changed.get("recovery", {})}),
    )


@asynccontextmanager
async def gateway_on(
    config: schema.Config,
    database: pool.Database,
    simulator: Simulator,
    *,
    log: LoggerService | None = None,
    is_migrated: bool = False,
) -> AsyncIterator[Gateway]:
    """A gateway with these settings, ready. Two gateways on one database need the same OpenRouter: the recovery of each
    looks up the due holds of both. `is_migrated`: the database is known to be, and the start does not look again."""
    app = build_app(config, log=log or LoggerService(), secrets=[SECRET])

    async def none(url: str) -> list[str]:
        return []

    known = mock.patch.object(migrations, "pending_migrations", none)
    async with AsyncExitStack() as stack:
        with known if is_migrated else nullcontext():
            url = await stack.enter_async_context(listening(app, config))
            session = await stack.enter_async_context(aiohttp.ClientSession(auto_decompress=False))
            running = Gateway(url, app, simulator, database, session)
            await running.ready()
        yield running
