"""Several processes on one port (`server.workers`), kept by gunicorn: a worker that dies is replaced, and SIGHUP replaces all.

The master binds the ports, and does nothing else: it has no loop, no connection and no journal. Each worker is a whole service,
with a loop, a pool, batchers and a journal of its own; what must be exact across them is exact in the database. A worker that is
to end takes no more connections, finishes its answers and closes their money, while its successors accept on the same port.
"""

import asyncio
import logging
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
from gptutor.config import load as configuration
from gptutor.config.schema import Config, ConfigError
from gptutor.config.secrets import secret_keys
from gptutor.http.app_keys import JOURNAL, READINESS
from gptutor.server.banner import banner
from gptutor.server.listener import StartError, authority, complain_calmly, listening_by, listening_on
from gptutor.server.serve import (
    administrator,
    collect_seldom,
    connection_of,
    database_of,
    prepare_database,
    require_c_parser,
    run_loop,
    service,
)
from gptutor.telemetry.log_writer import logging_to
from gptutor.telemetry.metrics import build_metrics

LOGGER = logging.getLogger("gptutor.workers")
BOOT_S = 5.0
"""So long a worker waits for its database before it accepts connections; then it does, and says that it is not ready."""
NOTIFY_S = 0.5
HUNG_S = 60
"""A worker whose loop has not turned for so long is killed, and its journal replayed."""
RESERVE_S = 20


def serve(config: Config) -> None:
    """Runs until SIGINT or SIGTERM. Raises StartError, ConfigError."""
    if config.simulated:
        raise StartError("server.workers above 1 needs OPENROUTER_API_KEY: the built-in simulator lives in a single process.")
    if not config.server.port:
        raise StartError("server.port must be a number above 0 where server.workers is above 1.")
    require_c_parser()
    secrets = secret_keys(config)
    with database_of(config) as grounded:
        asyncio.run(prepare_database(grounded, embedded=config.embedded))
        print(banner(config, url=f"http://{authority(config.server.host, config.server.port)}", demo_key=None), flush=True)
        Arbiter(Master(grounded, secrets)).run()


class Master(BaseApplication):  # type: ignore[misc]
    """gunicorn's view of the service: addresses, and how many workers there are."""

    def __init__(self, config: Config, secrets: Sequence[bytes]) -> None:
        self.config = config
        self.secrets = secrets
        super().__init__()

    def load_config(self) -> None:
        server, admin = self.config.server, self.config.admin
        addresses = [authority(server.host, server.port)]
        if admin.is_open:
            addresses.append(f"unix:{admin.socket}" if admin.socket else f"127.0.0.1:{admin.port}")
        for name, value in {
            "bind": addresses,
            "umask": 0o117,  # of the administrator's socket
            "workers": server.workers,
            "worker_class": Worker,
            "worker_tmp_dir": "/dev/shm" if Path("/dev/shm").is_dir() else None,  # noqa: S108 - a heartbeat, not a secret
            "timeout": HUNG_S,
            "graceful_timeout": int(server.shutdown_s + server.drain_s + RESERVE_S),
            "loglevel": "warning",
            "control_socket_disable": True,
        }.items():
            self.cfg.set(name, value)

    def load(self) -> None:
        """There is no WSGI here; a worker builds its own."""

    def reload(self) -> None:
        """At SIGHUP: settings that are none leave those of before in force."""
        try:
            fresh = configuration.load()
            secrets = secret_keys(fresh)
        except ConfigError as error:
            print(f"gptutor: the settings are not taken: {error}", file=sys.stderr, flush=True)
            return
        if fresh.embedded:
            fresh = msgspec.structs.replace(fresh, database=self.config.database)
        self.config, self.secrets = fresh, secrets
        super().reload()


class Worker(GunicornWorker):  # type: ignore[misc]
    """One process of the service."""

    def init_signals(self) -> None:
        """However it is told to end, it finishes what it has begun."""
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
        complain_calmly(loop)
        public, *private = self.sockets
        async with self._alive_to_the_end(), AsyncExitStack() as stack:
            logs = config.logs
            log = stack.enter_context(
                logging_to(config.paths.logs, level=logs.level, retention_days=logs.retention_days, stdout=logs.stdout)
            )
            app = build_app(config, log=log, secrets=secrets)
            await stack.enter_async_context(
                listening_by(service(app, config.server), public.sock, connection_of(config), lambda: _ready(app))
            )
            if config.metrics.port:
                runner = web.AppRunner(build_metrics(), access_log=None, shutdown_timeout=1)
                port = config.metrics.port + app[JOURNAL].slot_number
                metrics = listening_on(runner, config.metrics.host, port, setting="GPTUTOR_METRICS__PORT")
                try:
                    await stack.enter_async_context(metrics)
                except StartError as error:  # a worker that does not start ends the service, and figures are not worth that
                    LOGGER.error("There are no metrics of this process: %s", error)
            for one in private:
                admin = administrator(build_admin(config, log=log, secrets=secrets))
                await stack.enter_async_context(listening_by(admin, one.sock, connection_of(config)))
            collect_seldom()
            while self.alive and self.ppid == os.getppid():  # noqa: ASYNC110 - a signal's handler changes it
                await asyncio.sleep(NOTIFY_S)

    @asynccontextmanager
    async def _alive_to_the_end(self) -> AsyncIterator[None]:
        """Lets the master know that the loop turns, also while the last answers are being finished."""

        async def notify() -> None:
            while True:
                self.notify()
                await asyncio.sleep(NOTIFY_S)

        notifying = asyncio.get_running_loop().create_task(notify())
        try:
            yield
        finally:
            notifying.cancel()


async def _ready(app: web.Application) -> None:
    until = asyncio.get_running_loop().time() + BOOT_S
    while app[READINESS].obstacle is not None and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
