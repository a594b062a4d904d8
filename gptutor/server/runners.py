"""How the public application and the administrators' run: their aiohttp runners, and the limits of their clients' connections."""

import asyncio
import functools

from aiohttp import web
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy

from gptutor.config.schema import Config
from gptutor.http.address_limits import parse_networks
from gptutor.http.connection import ClientConnection
from gptutor.http.connection_limits import ConnectionLimits
from gptutor.server.listener import ConnectionFactory, StartError
from gptutor.telemetry.logs import HTTP_SERVER_LOGGER

LINE_BYTES_MAX = 8190
HEADERS_MAX = 128


def public_runner(app: web.Application, shutdown_s: float) -> web.AppRunner:
    """A client's disconnect cancels the handler; at shutdown, running requests have `shutdown_s` to finish."""
    return web.AppRunner(app, handler_cancellation=True, shutdown_timeout=shutdown_s / 2)  # aiohttp waits for it twice


def admin_runner(app: web.Application) -> web.AppRunner:
    """A disconnect cancels nothing: a change that has its audit line must not be undone half-way."""
    return web.AppRunner(app, shutdown_timeout=1)


def connection_factory(config: Config) -> ConnectionFactory:
    """Makes clients' connections, with the limits of the settings; to be called once for each listener."""
    server = config.server
    limits = ConnectionLimits(
        connections_max=server.connections_max,
        per_address_max=server.connections_per_address_max,
        trusted_proxies=parse_networks(server.trusted_proxies),
    )
    return functools.partial(
        ClientConnection,
        loop=asyncio.get_running_loop(),
        header_s=server.header_s,
        silent_s=config.relay.write_timeout_s,
        limits=limits,
        keepalive_timeout=server.keepalive_s,
        lingering_time=server.linger_s,
        max_line_size=LINE_BYTES_MAX,
        max_field_size=LINE_BYTES_MAX,
        max_headers=HEADERS_MAX,
        auto_decompress=False,  # a compressed body is rejected, not decompressed
        access_log=None,
        logger=HTTP_SERVER_LOGGER,
    )


def require_c_parser() -> None:
    """Raises StartError: aiohttp's parser in Python accepts requests that the one in C rejects."""
    if HttpRequestParser is HttpRequestParserPy:
        raise StartError(
            "aiohttp runs without its C parser, and its Python parser is less strict. Reinstall aiohttp, "
            "or unset AIOHTTP_NO_EXTENSIONS."
        )
