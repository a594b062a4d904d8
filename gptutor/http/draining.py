"""The end of a process whose successor accepts connections already: no request on its own connections is lost.

Requests that still come on open connections are answered, each with `Connection: close`, so that clients open their next
connection elsewhere. A connection is closed while it is idle only if nothing came on it for a while.
"""

import asyncio
import select

from aiohttp import web

from gptutor.http.app_keys import READINESS
from gptutor.http.connection import ClientConnection

POLL_S = 0.1
JUST_ACCEPTED_S = 1.0
"""So long after the listening socket is closed, connections that were accepted just before may still appear."""


async def announce_close(request: web.Request, response: web.StreamResponse) -> None:
    """Signal: while the process drains, a connection's last response says that it is the last."""
    connection = request.protocol
    if request.app[READINESS].is_draining and not (isinstance(connection, ClientConnection) and connection.has_more_requests):
        response.force_close()
        response.headers["Connection"] = "close"


async def drain_connections(server: web.Server, *, idle_s: float, total_s: float) -> None:
    """Returns when no connection is left, at most after `total_s`. Connections that are idle for `idle_s` are closed."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    idle_since: dict[web.RequestHandler, float] = {}
    while loop.time() < began + total_s and (server.connections or loop.time() < began + min(JUST_ACCEPTED_S, total_s)):
        now = loop.time()
        idle = [one for one in server.connections if isinstance(one, ClientConnection) and one.is_idle]
        idle_since = {one: idle_since.get(one, now) for one in idle}
        for connection, since in idle_since.items():
            if now - since >= idle_s and not _has_unread_bytes(connection):
                connection.force_close()
        await asyncio.sleep(POLL_S)


def _has_unread_bytes(connection: web.RequestHandler) -> bool:
    """Whether a request waits in the kernel."""
    sock = connection.transport.get_extra_info("socket") if connection.transport is not None else None
    if sock is None:
        return False
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(0))
