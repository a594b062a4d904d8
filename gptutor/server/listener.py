"""Listening on a port: what cannot start says so in a sentence."""

import asyncio
import errno
import functools
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from aiohttp import web

LOGGER = logging.getLogger("gptutor.listener")
BACKLOG = 128
"""Connections that may wait to be accepted; a server out of file descriptors fails so many times in a row."""
OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE})
LOOK_S = 0.5
COMPLAINT_PAUSE_S = 5.0
LATECOMERS_S = 1.0
"""A connection that was accepted in the last moment has its request on the way."""


class StartError(Exception):
    """Something cannot start; the text is a sentence for the operator."""


def complain_calmly(loop: asyncio.AbstractEventLoop) -> None:
    """A process without file descriptors says so from time to time. (uvloop drops connections then, and does not tell.)"""
    silent_until = 0.0

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not ("socket" in context and isinstance(error, OSError) and error.errno in OUT_OF_DESCRIPTORS):
            loop.default_exception_handler(context)

    def look() -> None:
        nonlocal silent_until
        loop.call_later(LOOK_S, look)
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS and loop.time() >= silent_until:
                silent_until = loop.time() + COMPLAINT_PAUSE_S
                LOGGER.error("No connection can be accepted: %s. Raise LimitNOFILE of the service.", error.strerror)

    loop.set_exception_handler(handle)
    look()


Connecting = Callable[[web.Server], web.RequestHandler]
"""Makes the protocol of a connection; by default aiohttp's own."""


def authority(host: str, port: int) -> str:
    """As it stands in a URL, where an IPv6 address has brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@asynccontextmanager
async def listening_on(
    runner: web.AppRunner, host: str, port: int, connection: Connecting = web.Server.__call__, *, setting: str = ""
) -> AsyncIterator[str]:
    """Sets the runner's application up and listens; gives the address. Cleans up at the end, and after a failed start as well.

    Port 0 takes any free one. `setting` is what the operator changes for another one. Raises StartError.
    """
    async with _set_up(runner, connection) as protocol:
        try:
            listener = await asyncio.get_running_loop().create_server(protocol, host, port, reuse_address=True, backlog=BACKLOG)
        except OSError as error:
            taken = " Is something else running there?" if error.errno == errno.EADDRINUSE else ""
            advice = f" The port is set by {setting}." if setting else ""
            raise StartError(f"Cannot listen on {authority(host, port)}: {error.strerror}.{taken}{advice}") from error
        try:
            shown = {"127.0.0.1": "localhost"}.get(host, host)
            yield f"http://{authority(shown, listener.sockets[0].getsockname()[1])}"
        finally:
            listener.close()


@asynccontextmanager
async def listening_at(runner: web.AppRunner, path: Path, connection: Connecting = web.Server.__call__) -> AsyncIterator[None]:
    """The same on a Unix socket, which its owner and his group may use. Raises StartError."""
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
async def listening_by(
    runner: web.AppRunner,
    listener: socket.socket,
    connection: Connecting = web.Server.__call__,
    ready: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[None]:
    """The same by a socket that listens already, and may do so for other processes too; `ready` is waited for in between."""
    async with _set_up(runner, connection) as protocol:
        if ready is not None:
            await ready()
        accepting = await asyncio.get_running_loop().create_server(protocol, sock=listener, backlog=BACKLOG)
        try:
            yield
        finally:
            accepting.close()
            await asyncio.sleep(LATECOMERS_S)


@asynccontextmanager
async def _set_up(runner: web.AppRunner, connection: Connecting) -> AsyncIterator[Callable[[], web.RequestHandler]]:
    try:
        await runner.setup()
        yield functools.partial(connection, cast("web.Server", runner.server))
    finally:
        await runner.cleanup()
