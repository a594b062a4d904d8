"""Listening on a port: what cannot start says so in a sentence."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

from aiohttp import web

BACKLOG = 1024
"""Connections that may wait to be accepted."""


class StartError(Exception):
    """Something cannot start; the text is a sentence for the operator."""


@asynccontextmanager
async def listening_on(
    runner: web.AppRunner, host: str, port: int, connection: Callable[[web.Server], web.RequestHandler] = web.Server.__call__
) -> AsyncIterator[str]:
    """Sets the runner's application up and listens; gives the address. Cleans up at the end, and after a failed start as well.

    Port 0 takes any free one. `connection` makes the protocol of a connection; aiohttp's own by default. Raises StartError.
    """
    try:
        await runner.setup()
        protocol = functools.partial(connection, cast("web.Server", runner.server))
        try:
            listener = await asyncio.get_running_loop().create_server(protocol, host, port, reuse_address=True, backlog=BACKLOG)
        except OSError as error:
            raise StartError(f"Cannot listen on {host}:{port}: {error.strerror}. Is something else running there?") from error
        try:
            shown = {"127.0.0.1": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
            yield f"http://{shown}:{listener.sockets[0].getsockname()[1]}"
        finally:
            listener.close()
    finally:
        await runner.cleanup()
