"""Listening on a port: what cannot start says so in a sentence."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web


class StartError(Exception):
    """Something cannot start; the text is a sentence for the operator."""


@asynccontextmanager
async def listening_on(runner: web.AppRunner, host: str, port: int) -> AsyncIterator[str]:
    """Sets the runner's application up and listens; gives the address. Cleans up at the end, and after a failed start as well.

    Port 0 takes any free one. Raises StartError.
    """
    try:
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, reuse_address=True).start()
        except OSError as error:
            raise StartError(f"Cannot listen on {host}:{port}: {error.strerror}. Is something else running there?") from error
        shown = {"127.0.0.1": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
        yield f"http://{shown}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
