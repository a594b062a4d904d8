"""`gptutor serve` with a master process: under systemd, and with several processes on one port (`server.workers`).

Each worker is a complete service, with an event loop, a connection pool, batchers and a journal of its own; limits that span the
workers are enforced in the database. A worker that stops accepts no more connections, answers what still comes on those that it
has, finishes its running requests and settles their charges, while its successors accept on the same port. `supervisor.py` says
when.
"""

import asyncio
import functools
import gc
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from aiohttp import web

from gptutor.admin.app import build_admin
from gptutor.app import build_app
from gptutor.config.load import load
from gptutor.config.schema import Config, ConfigError
from gptutor.config.secrets import secret_keys
from gptutor.http.app_keys import CONFIG, READINESS
from gptutor.http.draining import drain_connections
from gptutor.money.journal import JournalError
from gptutor.server import service_manager
from gptutor.server.account_line import account_line
from gptutor.server.banner import banner
from gptutor.server.listener import StartError, host_and_port, listening_on_inherited_socket
from gptutor.server.process import report_descriptor_exhaustion, run_loop, tune_garbage_collection
from gptutor.server.reload import LastReload
from gptutor.server.runners import admin_runner, connection_factory, public_runner, require_c_parser
from gptutor.server.serve import logging_of, prepare_database
from gptutor.server.sockets import adopted, bind_all, close, tcp_address, unix_address
from gptutor.server.supervisor import (
    BOOT_ERROR,
    SIGNALS,
    STOP_SIGNALS,
    Handover,
    MasterLink,
    Plan,
    Report,
    Supervisor,
    block_signals,
)
from gptutor.telemetry.metrics_page import build_metrics, process_metrics

LOGGER = logging.getLogger("gptutor.workers")
BOOT_S = 5.0
"""A worker waits so long for its database before it accepts connections; then it accepts them, and /ready says 503."""
BEAT_S = 0.5
"""How often a worker tells the master that its event loop runs."""
STOP_MARGIN_S = 15
"""Added to the settings' own stop times before the master kills a worker."""


def needs_master(config: Config) -> bool:
    """The embedded database and the simulator belong to a single process."""
    return (config.server.workers > 1 or service_manager.is_present()) and not (config.embedded or config.simulated)


def serve(config: Config) -> int:
    """Runs until SIGINT or SIGTERM; returns the exit code. Raises StartError, ConfigError."""
    block_signals()
    require_c_parser()
    secrets = secret_keys(config)
    asyncio.run(prepare_database(config, embedded=False))
    listeners = bind_all(addresses(config))
    port = listeners[public_address(config)].getsockname()[1]
    url = f"http://{host_and_port({'127.0.0.1': 'localhost'}.get(config.server.host, config.server.host), port)}"
    account = asyncio.run(account_line(config))
    last_reload = LastReload()
    supervisor = Supervisor(
        plan(config, secrets, listeners, last_reload),
        listeners,
        reporter(config),
        last_reload=last_reload,
        on_start=lambda: print(banner(config, url=url, demo_key=None, account=account), flush=True),
    )
    return _run(supervisor, listeners)


def take_over(predecessor: Handover) -> int:
    """Like `serve`, in the place of a master whose workers serve still. Whatever goes wrong is reported, and these go on."""
    block_signals()
    succeeded, at = predecessor.last_reload
    last_reload = LastReload(succeeded=succeeded, at=at, descriptor=predecessor.last_reload_descriptor)
    listeners = {address: adopted(descriptor) for address, descriptor in predecessor.sockets.items()}
    wanted: Plan | None = None
    report: Report = _report_on_stderr
    obstacle = None
    try:
        config = load()
        report = reporter(config)
        if config.embedded or config.simulated:
            raise StartError("Without DATABASE_URL or OPENROUTER_API_KEY the service needs a restart, not a reload.")
        secrets = secret_keys(config)
        wanted = plan(config, secrets, listeners, last_reload)  # replaces what dies, also if the next line fails
        listeners = bind_all(addresses(config), inherited=listeners)
        wanted = plan(config, secrets, listeners, last_reload)
    except (ConfigError, StartError) as error:
        obstacle = str(error)
    supervisor = Supervisor(wanted, listeners, report, last_reload=last_reload, predecessor=predecessor)
    if obstacle is not None:
        supervisor.refuse(obstacle)
    return _run(supervisor, listeners)


def _run(supervisor: Supervisor, listeners: dict[str, socket.socket]) -> int:
    gc.collect()
    gc.freeze()  # the workers share this memory as long as nobody touches it
    try:
        return supervisor.run()
    finally:
        for address, listener in listeners.items():
            close(address, listener)


def public_address(config: Config) -> str:
    return tcp_address(config.server.host, config.server.port)


def admin_address(config: Config) -> str:
    """Empty if there is no listener for administrators."""
    admin = config.admin
    if not admin.is_enabled:
        return ""
    return unix_address(admin.socket) if admin.socket else tcp_address("127.0.0.1", admin.port)


def metrics_address(config: Config) -> str:
    """Empty if the metrics have no listener of their own."""
    return tcp_address(config.metrics.host, config.metrics.port) if config.metrics.port else ""


def addresses(config: Config) -> dict[str, str]:
    """The addresses that all workers share, the public one first, each with the setting that it comes from."""
    shared = {
        public_address(config): "PORT",
        admin_address(config): "GPTUTOR_ADMIN__PORT",
        metrics_address(config): "GPTUTOR_METRICS__PORT",
    }
    return {address: setting for address, setting in shared.items() if address}


def plan(config: Config, secrets: Sequence[bytes], listeners: dict[str, socket.socket], last_reload: LastReload) -> Plan:
    server = config.server
    return Plan(
        server.workers,
        functools.partial(run_worker, config, secrets, listeners, last_reload),
        stop_s=server.shutdown_s + server.drain_s + STOP_MARGIN_S,
    )


def reporter(config: Config) -> Report:
    """Writes single lines into the log. Its threads end with each line: a process with threads should not fork."""
    return functools.partial(_report, config)


def _report(config: Config, level: int, message: str) -> None:
    try:
        with logging_of(config):
            LOGGER.log(level, message)
    except OSError as error:
        print(f"gptutor: {message} (The log cannot be written: {error})", file=sys.stderr, flush=True)


def _report_on_stderr(level: int, message: str) -> None:
    print(f"gptutor: {message}", file=sys.stderr, flush=True)


def run_worker(
    config: Config, secrets: Sequence[bytes], listeners: dict[str, socket.socket], last_reload: LastReload, link: MasterLink
) -> int:
    """The life of a worker, in its own process; returns the exit code."""
    last_reload.export()
    try:
        run_loop(_serve(config, secrets, listeners, link))
    except (StartError, ConfigError, JournalError, OSError) as error:
        link.fault(str(error))
        return BOOT_ERROR
    return 0


async def _serve(config: Config, secrets: Sequence[bytes], listeners: dict[str, socket.socket], link: MasterLink) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the master's affair; a terminal sends it to all
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    report_descriptor_exhaustion(loop)
    public = next(iter(listeners.values()))
    async with _beating(link, stop), AsyncExitStack() as stack:
        log = stack.enter_context(logging_of(config))
        metrics = await stack.enter_async_context(process_metrics(config.paths.data, is_served=config.serves_metrics))
        app = build_app(config, log=log, secrets=secrets)
        await stack.enter_async_context(
            listening_on_inherited_socket(
                public_runner(app, config.server.shutdown_s / 2),  # the other half is for draining
                public,
                connection_factory(config),
                ready=lambda: _ready(app),
                retire=lambda server: _drain(app, server),
            )
        )
        # What dies after a reload that was refused, because an address cannot be bound, is replaced without that listener.
        if (listener := listeners.get(admin_address(config))) is not None:
            runner = admin_runner(build_admin(config, log=log, secrets=secrets, metrics=metrics))
            await stack.enter_async_context(listening_on_inherited_socket(runner, listener, connection_factory(config)))
        if (listener := listeners.get(metrics_address(config))) is not None:
            runner = web.AppRunner(build_metrics(metrics), access_log=None, shutdown_timeout=1)
            await stack.enter_async_context(listening_on_inherited_socket(runner, listener, connection_factory(config)))
        tune_garbage_collection()
        link.ready()
        await stop.wait()


@asynccontextmanager
async def _beating(link: MasterLink, stop: asyncio.Event) -> AsyncIterator[None]:
    """Tells the master that the event loop runs, also while the last requests are being finished; stops if the master died."""

    async def beat() -> None:
        while True:
            if not link.beat():
                stop.set()
            await asyncio.sleep(BEAT_S)

    task = asyncio.get_running_loop().create_task(beat())
    try:
        yield
    finally:
        task.cancel()


async def _ready(app: web.Application) -> None:
    """Waits until the application is ready, at most BOOT_S."""
    until = asyncio.get_running_loop().time() + BOOT_S
    while app[READINESS].obstacle is not None and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def _drain(app: web.Application, server: web.Server) -> None:
    settings = app[CONFIG].server
    app[READINESS].drain(settings.shutdown_s)
    total_s = settings.shutdown_s / 2
    await drain_connections(server, idle_s=min(settings.keepalive_grace_s, total_s), total_s=total_s)
