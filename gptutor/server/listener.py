"""Listening on a port, a Unix socket or an inherited socket. A failure is a sentence for the operator."""

import asyncio
import errno
import functools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

from aiohttp import web

BACKLOG = 128
"""Connections that may wait to be accepted. Without free file descriptors accept() fails up to so many times in a row."""

ConnectionFactory = Callable[[web.Server], web.RequestHandler]
"""Makes the protocol of a client's connection; by default aiohttp's own."""


class StartError(Exception):
    """The service, or a part of it, cannot start; the text is a sentence for the operator."""


def host_and_port(host: str, port: int) -> str:
    """As a URL has them: an IPv6 address is in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_error(host: str, port: int, error: OSError, setting: str = "") -> StartError:
    """`setting` is the name of the setting of the port."""
    taken = " Is something else running there?" if error.errno == errno.EADDRINUSE else ""
    advice = f" The port is set by {setting}." if setting else ""
    return StartError(f"Cannot listen on {host_and_port(host, port)}: {error.strerror}.{taken}{advice}")


@asynccontextmanager
async def listening_on(
    runner: web.AppRunner, host: str, port: int, connection: ConnectionFactory = web.Server.__call__, *, setting: str = ""
) -> AsyncIterator[str]:
    """Sets the runner's application up, listens on the port, and yields the URL. Cleans up at the end, and after a failed start.

    Port 0 takes any free port. `setting` is the name of the setting of the port, for the error. Raises StartError.
    """
    async with _set_up(runner, connection) as protocol:
        try:
            listener = await asyncio.get_running_loop().create_server(protocol, host, port, reuse_address=True, backlog=BACKLOG)
        except OSError as error:
            raise address_error(host, port, error, setting) from error
        try:
            name = {"127.0.0.1": "localhost"}.get(host, host)
            yield f"http://{host_and_port(name, listener.sockets[0].getsockname()[1])}"
        finally:
            listener.close()


@asynccontextmanager
async def listening_on_unix_socket(
    runner: web.AppRunner, path: Path, connection: ConnectionFactory = web.Server.__call__
) -> AsyncIterator[None]:
    """Like `listening_on`, on a Unix socket that its owner and group may use. Raises StartError."""
    async with _set_up(runner, connection) as protocol:
        try:
            listener = await asyncio.get_running_loop().create_unix_server(protocol, path, backlog=BACKLOG)
            path.chmod(0o660)  # noqa: ASYNC240 - a moment, at the start
        except OSError as error:
            raise StartError(f"Cannot listen on the socket {path}: {error.strerror or error}.") from error
        try:
            yield
        finally:
            listener.close()
            path.unlink(missing_ok=True)  # noqa: ASYNC240 - a moment, at the end


@asynccontextmanager
async def listening_on_inherited_socket(
    runner: web.AppRunner,
    listener: socket.socket,
    connection: ConnectionFactory = web.Server.__call__,
    ready: Callable[[], Awaitable[None]] | None = None,
    retire: Callable[[web.Server], Awaitable[None]] | None = None,
) -> AsyncIterator[None]:
    """Like `listening_on`, with a listening socket that other processes may share. Accepts connections after `ready()`.

    At the end no more connections are accepted, and `retire()` lets those that are open come to their ends.
    """
    async with _set_up(runner, connection) as protocol:
        if ready is not None:
            await ready()
        accepting = await asyncio.get_running_loop().create_server(protocol, sock=listener, backlog=BACKLOG)
        try:
            yield
        finally:
            accepting.close()
            if retire is not None:
                await retire(cast("web.Server", runner.server))


@asynccontextmanager
async def _set_up(runner: web.AppRunner, connection: ConnectionFactory) -> AsyncIterator[Callable[[], web.RequestHandler]]:
    try:
        await runner.setup()
        yield functools.partial(connection, cast("web.Server", runner.server))
    finally:
        await runner.cleanup()
