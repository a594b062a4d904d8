"""Several processes on one port (`server.workers`), supervised by gunicorn: a dead worker is replaced, and SIGHUP replaces all.

The master only binds the ports: it has no event loop, database connection or journal. Each worker is a complete service, with an
event loop, a connection pool, batchers and a journal of its own; limits that span the workers are enforced in the database. A
worker that stops accepts no more connections, finishes its running requests and settles their charges, while its successors
accept on the same port.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
from aiohttp import web
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker as GunicornWorker

from gptutor.admin.app import build_admin
from gptutor.app import build_app
from gptutor.config.load import load
from gptutor.config.schema import Config, ConfigError
from gptutor.config.secrets import secret_keys
from gptutor.http.app_keys import READINESS
from gptutor.server.account_line import account_line
from gptutor.server.banner import banner
from gptutor.server.listener import StartError, host_and_port, listening_on_inherited_socket
from gptutor.server.process import report_descriptor_exhaustion, run_loop, tune_garbage_collection
from gptutor.server.runners import admin_runner, connection_factory, public_runner, require_c_parser
from gptutor.server.serve import prepare_database, resolved_database
from gptutor.telemetry.log_writer import logging_to
from gptutor.telemetry.metrics_page import build_metrics, process_metrics

BOOT_S = 5.0
"""A worker waits so long for its database before it accepts connections; then it accepts them, and /ready says 503."""
NOTIFY_S = 0.5
"""How often a worker tells the master that its event loop runs."""
HUNG_S = 60
"""A worker whose event loop has not run for so long is killed; its journal is replayed by another."""
STOP_MARGIN_S = 20
"""Added to the settings' own stop times before the master kills a worker."""


def serve(config: Config) -> None:
    """Runs until SIGINT or SIGTERM. Raises StartError, ConfigError."""
    if config.simulated:
        raise StartError("server.workers above 1 needs OPENROUTER_API_KEY: the built-in simulator runs in a single process only.")
    if not config.server.port:
        raise StartError("server.port must not be 0 if server.workers is above 1.")
    require_c_parser()
    secrets = secret_keys(config)
    with resolved_database(config) as resolved:
        asyncio.run(prepare_database(resolved, embedded=config.embedded))
        url = f"http://{host_and_port(config.server.host, config.server.port)}"
        print(banner(config, url=url, demo_key=None, account=asyncio.run(account_line(config))), flush=True)
        Arbiter(Master(resolved, secrets)).run()


class Master(BaseApplication):  # type: ignore[misc]
    """The service as gunicorn's application: its addresses and the number of its workers."""

    def __init__(self, config: Config, secrets: Sequence[bytes]) -> None:
        self.config = config
        self.secrets = secrets
        super().__init__()

    def load_config(self) -> None:
        server, admin, metrics = self.config.server, self.config.admin, self.config.metrics
        addresses = [host_and_port(server.host, server.port)]
        if admin.is_enabled:
            addresses.append(f"unix:{admin.socket}" if admin.socket else f"127.0.0.1:{admin.port}")
        if metrics.port:
            addresses.append(host_and_port(metrics.host, metrics.port))
        for name, value in {
            "bind": addresses,
            "umask": 0o117,  # of the administrators' Unix socket
            "workers": server.workers,
            "worker_class": Worker,
            "worker_tmp_dir": "/dev/shm" if Path("/dev/shm").is_dir() else None,  # noqa: S108 - a heartbeat, not a secret
            "timeout": HUNG_S,
            "graceful_timeout": int(server.shutdown_s + server.drain_s + STOP_MARGIN_S),
            "loglevel": "warning",
            "control_socket_disable": True,
        }.items():
            self.cfg.set(name, value)

    def load(self) -> None:
        """Nothing: there is no WSGI application, and each worker builds its own aiohttp one."""

    def reload(self) -> None:
        """At SIGHUP. Invalid settings are reported; the previous ones stay in effect."""
        try:
            config = load()
            secrets = secret_keys(config)
        except ConfigError as error:
            print(f"gptutor: the previous settings stay in effect: {error}", file=sys.stderr, flush=True)
            return
        if config.embedded:
            config = msgspec.structs.replace(config, database=self.config.database)
        self.config, self.secrets = config, secrets
        super().reload()


class Worker(GunicornWorker):  # type: ignore[misc]
    """One process of the service."""

    def init_signals(self) -> None:
        """SIGINT and SIGQUIT stop a worker gracefully, as SIGTERM does."""
        super().init_signals()
        for number in (signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, self.handle_exit)

    def run(self) -> None:
        try:
            run_loop(self._serve(self.app.config, self.app.secrets))
        except (StartError, ConfigError) as error:
            print(f"gptutor: {error}", file=sys.stderr, flush=True)
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    async def _serve(self, config: Config, secrets: Sequence[bytes]) -> None:
        loop = asyncio.get_running_loop()
        report_descriptor_exhaustion(loop)
        public, *private = self.sockets
        async with self._notifying(), AsyncExitStack() as stack:
            logs = config.logs
            log = stack.enter_context(
                logging_to(
                    config.paths.logs,
                    level=logs.level,
                    retention_days=logs.retention_days,
                    bytes_max=logs.bytes_max,
                    file_bytes_max=logs.file_bytes_max,
                    stdout=logs.stdout,
                    compresses=True,
                    warnings_per_minute=logs.warnings_per_minute,
                    refused_per_minute=logs.refused_per_minute,
                )
            )
            metrics = await stack.enter_async_context(process_metrics(config.paths.data, is_served=config.serves_metrics))
            app = build_app(config, log=log, secrets=secrets)
            await stack.enter_async_context(
                listening_on_inherited_socket(
                    public_runner(app, config.server), public.sock, connection_factory(config), lambda: _ready(app)
                )
            )
            runners = []
            if config.admin.is_enabled:
                runners.append(admin_runner(build_admin(config, log=log, secrets=secrets, metrics=metrics)))
            if config.metrics.port:
                runners.append(web.AppRunner(build_metrics(metrics), access_log=None, shutdown_timeout=1))
            for runner, listener in zip(runners, private, strict=True):
                await stack.enter_async_context(listening_on_inherited_socket(runner, listener.sock, connection_factory(config)))
            tune_garbage_collection()
            while self.alive and self.ppid == os.getppid():  # noqa: ASYNC110 - a signal handler changes it
                await asyncio.sleep(NOTIFY_S)

    @asynccontextmanager
    async def _notifying(self) -> AsyncIterator[None]:
        """Tells the master that the event loop runs, also while the last requests are being finished."""

        async def notify() -> None:
            while True:
                self.notify()
                await asyncio.sleep(NOTIFY_S)

        task = asyncio.get_running_loop().create_task(notify())
        try:
            yield
        finally:
            task.cancel()


async def _ready(app: web.Application) -> None:
    """Waits until the application is ready, at most BOOT_S."""
    until = asyncio.get_running_loop().time() + BOOT_S
    while app[READINESS].obstacle is not None and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
