"""Without a connection to OpenRouter nothing is bought, whatever goes wrong (contract C8; row upstream-1)."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gptutor.config.schema import Config
from gptutor.database import pool
from gptutor.simulator.server import Simulator
from tests.support.gateway import Gateway, config_for, gateway_on


@asynccontextmanager
async def gateway_of(config: Config, database: pool.Database) -> AsyncIterator[Gateway]:
    """A gateway with a saved model list: its OpenRouter is unreachable."""
    config.paths.data.mkdir(parents=True)
    (config.paths.data / "models.json").write_bytes(Simulator().model_list)
    async with gateway_on(config, database, Simulator()) as gateway:
        yield gateway


async def assert_nothing_bought(gateway: Gateway) -> None:
    client = await gateway.client()
    for stream in (False, True):
        response, _ = await gateway.chat(client, stream=stream)
        assert (response.status, response.headers["X-Error-Code"]) == (500, "upstream_unreachable")
        assert "x-should-retry" not in response.headers
    assert await client.held() == 0
    assert await client.balance() == 100


@pytest.mark.parametrize("answer", [b"", b"garbage\r\n\r\n", b"HTTP/1.1 502 Bad Gateway\r\n\r\n"])
async def test_a_proxy_that_does_not_connect(database: pool.Database, database_url: str, tmp_path: Path, answer: bytes) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    proxy = f"http://ivan:s3cret@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    tuned = {"openrouter": {"proxy": proxy, "attempts_max": 1}}
    async with gateway_of(config_for(database_url, "https://openrouter.invalid/api/v1", tmp_path, tuned), database) as gateway:
        await assert_nothing_bought(gateway)
    server.close()


@pytest.mark.parametrize(
    "limits", [{"total_s": 0.3, "first_byte_s": 0.3}, {"connect_s": 0.3, "total_s": 1.5, "first_byte_s": 1.5}]
)
async def test_a_connection_that_is_never_established(
    database: pool.Database, database_url: str, tmp_path: Path, limits: dict[str, Any]
) -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):  # the backlog is full, so no further connection is established
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(full.getsockname())
        config = config_for(database_url, f"http://127.0.0.1:{full.getsockname()[1]}/api/v1", tmp_path, {"openrouter": limits})
        async with gateway_of(config, database) as gateway:
            await assert_nothing_bought(gateway)


async def test_a_request_that_cannot_be_written(database: pool.Database, database_url: str, tmp_path: Path) -> None:
    config = config_for(database_url, "http://127.0.0.1:1/api/v1", tmp_path, {"openrouter": {"attempts_max": 1}})
    broken = msgspec.structs.replace(config.openrouter, api_key="sk-or-1\n")  # the configuration would reject it
    async with gateway_of(msgspec.structs.replace(config, openrouter=broken), database) as gateway:
        await assert_nothing_bought(gateway)
