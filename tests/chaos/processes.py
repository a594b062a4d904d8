"""The processes: a PostgreSQL that can crash, a simulator that must not, and workers that are restarted when killed."""

import asyncio
import base64
import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from gptutor.database.embedded import PostgresServer, embedded_postgres  # type: ignore[attr-defined]
from tests.support.forked import Forked
from tests.support.service import environment

ROOT = Path(__file__).parent.parent.parent
SECRET = bytes(range(32))
START_S = 60
# What takes minutes in production takes seconds here.
SETTINGS = {
    "GPTUTOR_DATABASE__STATEMENT_S": "2",
    "GPTUTOR_LOGS__STDOUT": "false",
    "GPTUTOR_OPENROUTER__CONNECT_S": "2",
    "GPTUTOR_OPENROUTER__FIRST_BYTE_S": "4",
    "GPTUTOR_OPENROUTER__IDLE_S": "2",
    "GPTUTOR_OPENROUTER__TOTAL_S": "5",
    "GPTUTOR_RATE_LIMIT__CHAT_PER_MINUTE": "100000",  # counted, and never reached: fewer requests would be a milder storm
    "GPTUTOR_RECOVERY__LOOKUP_INTERVAL_MAX_S": "2",
    "GPTUTOR_RECOVERY__POLL_S": "0.2",
    "GPTUTOR_RELAY__DISCONNECTED_DRAIN_S": "0.5",
    "GPTUTOR_RELAY__WRITE_TIMEOUT_S": "3",
    "GPTUTOR_SECRET_KEY": base64.b64encode(SECRET).decode(),
    "GPTUTOR_SERVER__DRAIN_S": "10",
    "GPTUTOR_SERVER__SHUTDOWN_S": "2",
}


class Postgres:
    """The embedded server, with fsync as in production. `url` connects to it directly, without the proxy."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url = url
        self.socket = Path(url.partition("?host=")[2]) / ".s.PGSQL.5432"
        self._server = PostgresServer._instances[directory.resolve()]

    @property
    def programs(self) -> Path:
        """The folder of PostgreSQL's own programs."""
        return Path(self._server.bin_path)

    def crash(self) -> None:
        """Stops at once, without a checkpoint: afterwards the files are as after a power failure."""
        self._pg_ctl("-m", "immediate", "stop")

    def start(self) -> None:
        """Starts, with crash recovery, which on a busy machine may take longer than the ten seconds that the package allows."""
        for _ in range(6):
            with contextlib.suppress(subprocess.SubprocessError, AssertionError, OSError):
                self._server.ensure_postgres_running()
                return
            time.sleep(0.5)
        self._server.ensure_postgres_running()

    def _pg_ctl(self, *arguments: str) -> None:
        pg_ctl = self._server.bin_path / "pg_ctl"
        subprocess.run(
            [pg_ctl, "-w", "-D", self._server.pgdata, *arguments],
            user=self._server.system_user,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=60,
        )


@contextmanager
def postgres(directory: Path) -> Iterator[Postgres]:
    with embedded_postgres(directory) as url:
        yield Postgres(url, directory)


@asynccontextmanager
async def simulator(port: int, output: Path) -> AsyncIterator[str]:
    """Runs the simulator, and yields its URL."""
    command = [sys.executable, "-m", "tests.chaos.upstream", str(port)]
    with output.open("ab") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)  # noqa: ASYNC220 - a moment, before the storm
    try:
        await _until_listening(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@dataclass
class Worker:
    """One `gptutor serve`, restarted whenever it is killed. `unexpected_exits` describes all other exits."""

    number: int
    port: int
    environ: dict[str, str]
    directory: Path
    is_listening: bool = False
    unexpected_exits: list[str] = field(default_factory=list)
    _process: Forked | None = None
    _was_killed: bool = False
    _is_stopping: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def run(self) -> None:
        """Starts the process again and again, until `stop`."""
        while not self._is_stopping:
            self._start()
            assert self._process is not None
            try:
                await _until_listening(self.port, self._process)
                self.is_listening = True
            except ChildProcessError:
                pass  # killed while it was starting, or reported below
            except TimeoutError:
                self.unexpected_exits.append(f"worker {self.number} did not listen within {START_S} s:\n{self._last_output()}")
            while self._process.poll() is None:
                await asyncio.sleep(0.02)
            self.is_listening = False
            if not self._was_killed:
                self.unexpected_exits.append(
                    f"worker {self.number} exited by itself with {self._process.returncode}:\n{self._last_output()}"
                )
                await asyncio.sleep(1)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self._process is not None
        self._was_killed = True
        self._process.send_signal(number)

    async def stop(self, within_s: float) -> int | None:
        """Sends SIGTERM, and returns the exit code, or None if the process does not exit in time. It is not restarted."""
        self._is_stopping = True
        self.kill(signal.SIGTERM)
        assert self._process is not None
        try:
            return await asyncio.to_thread(self._process.wait, within_s)
        except subprocess.TimeoutExpired:
            return None

    def kill_and_wait(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        self._was_killed = False
        with self._output.open("ab") as file:
            self._process = Forked(["serve"], cwd=self.directory, env=self.environ, stdout=file, stderr=file, text=True)

    @property
    def _output(self) -> Path:
        return self.directory / f"worker-{self.number}.out"

    def _last_output(self) -> str:
        output = self._output.read_text(errors="replace")
        return "".join(f"    {line}\n" for line in output.splitlines()[-25:])


@asynccontextmanager
async def workers(
    count: int, directory: Path, database_url: str, openrouter_url: str, rng: random.Random
) -> AsyncIterator[list[Worker]]:
    """Runs workers that share one data directory, as on one machine, and so replay each other's journals."""
    running = []
    for number in range(count):
        port = free_port(rng)
        settings = {"PORT": str(port), "DATABASE_URL": database_url, "OPENROUTER_BASE_URL": f"{openrouter_url}/api/v1"}
        environ = environment(directory, OPENROUTER_API_KEY="sk-or-simulator", **SETTINGS, **settings)
        running.append(Worker(number, port, environ, directory))
    tasks = [asyncio.create_task(worker.run()) for worker in running]
    try:
        yield running
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in running:
            worker.kill_and_wait()


def free_port(rng: random.Random) -> int:
    """A port below the range of outgoing connections, so that it is still free when a killed worker is restarted."""
    while True:
        port = rng.randint(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


async def all_listening(running: list[Worker]) -> None:
    """Waits for all workers to listen. Raises ChildProcessError, with their output, if one does not."""
    try:
        async with asyncio.timeout(START_S):
            while not all(worker.is_listening for worker in running):
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise ChildProcessError("\n".join(exit_text for worker in running for exit_text in worker.unexpected_exits)) from None


async def _until_listening(port: int, process: subprocess.Popen[Any]) -> None:
    """Raises ChildProcessError if the process ends first, TimeoutError if it takes too long."""
    async with asyncio.timeout(START_S), aiohttp.ClientSession() as session:
        while process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with session.get(f"http://127.0.0.1:{port}/health"):
                    return
            await asyncio.sleep(0.05)
    raise ChildProcessError
