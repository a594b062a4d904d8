"""The installed service, run as its unit has systemd run it: by its program through `current`, with settings and credentials in files."""

import asyncio
import base64
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import orjson
import psutil

from gptutor.cli.installation import CREDENTIALS, DATA, LOGS, SETTINGS
from tests.chaos.processes import SECRET
from tests.month.installation import program_of
from tests.month.small_disk import FREE_BYTES_MIN
from tests.month.waiting import Failed, require, until
from tests.support.service import run
from tests.support.service_manager import ServiceManager

WORKERS = 2
STOP_S = 60
WATCHDOG_S = 30
ALERTS_POLL_S = 0.5
# What takes minutes in production takes seconds here.
CONFIG = """\
paths:
  data: {data}
  logs: {logs}
server:
  port: {port}
  workers: {workers}
logs:
  stdout: false
rate_limit:
  chat_per_minute: 0
  refused_per_minute: 0
openrouter:
  base_url: {openrouter_url}
  account_poll_s: 1
  account_probe_s: 0.5
recovery:
  audit_interval_s: 1
alerts:
  url: {alerts_url}
  poll_s: {alerts_poll_s}
  disk_free_bytes_min: {free_bytes_min}
"""


class Service:
    def __init__(self, root: Path, directory: Path, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.manager = ServiceManager(directory / "notify")
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("GPTUTOR_", "OPENROUTER_"))},
            "SSL_CERT_FILE": os.devnull,  # no HTTPS server is called, and reading the system's authorities is slow
            "GPTUTOR_CONFIG": str(root / SETTINGS.lstrip("/") / "config.yaml"),
            "CREDENTIALS_DIRECTORY": str(root / CREDENTIALS.lstrip("/")),
        }
        self.environ.pop("DATABASE_URL", None)
        self.data, self.logs = (root / folder.lstrip("/") for folder in (DATA, LOGS))
        self._root = root
        self._output = directory / "service.out"
        self._process: subprocess.Popen[bytes] | None = None

    def configure(self, *, database_url: str, openrouter_url: str, alerts_url: str) -> None:
        """Writes what the operator writes after the installation."""
        settings = CONFIG.format(
            data=self.data,
            logs=self.logs,
            port=self.port,
            workers=WORKERS,
            openrouter_url=openrouter_url,
            alerts_url=alerts_url,
            alerts_poll_s=ALERTS_POLL_S,
            free_bytes_min=FREE_BYTES_MIN,
        )
        Path(self.environ["GPTUTOR_CONFIG"]).write_text(settings)
        secrets = {
            "DATABASE_URL": database_url,
            "OPENROUTER_API_KEY": "sk-or-simulator",
            "GPTUTOR_SECRET_KEY": base64.b64encode(SECRET).decode(),
        }
        for name, secret in secrets.items():
            Path(self.environ["CREDENTIALS_DIRECTORY"], name).write_text(secret)

    # -- commands

    def command(self, *arguments: str) -> Any:
        """What `gptutor <arguments> --json` says. Raises Failed."""
        ended = run(self.environ, *arguments, "--json", check=False)
        require(ended.returncode == 0, f"gptutor {' '.join(arguments)} failed: {ended.stderr}")
        return orjson.loads(ended.stdout)

    def migrate(self, release: str | None = None) -> None:
        """By the program of that release, or of the current one. Raises Failed."""
        program = program_of(self._root, release)
        ended = subprocess.run([program, "migrate"], env=self.environ, cwd=self.data, text=True, capture_output=True, check=False)
        require(ended.returncode == 0, f"gptutor migrate failed: {ended.stdout}{ended.stderr}")

    def broken_invariants(self) -> list[str]:
        """What `gptutor verify` finds."""
        ended = run(self.environ, "verify", check=False)
        return [] if ended.returncode == 0 else [f"gptutor verify: {ended.stdout}{ended.stderr}"]

    # -- the process

    async def start(self) -> None:
        """Waits until it is ready. Raises Failed."""
        environ = {
            **self.environ,
            "NOTIFY_SOCKET": self.manager.address,
            "WATCHDOG_USEC": str(WATCHDOG_S * 1_000_000),
            "PYTHONFAULTHANDLER": "1",
        }
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - a moment
                [program_of(self._root), "serve"], cwd=self.data, env=environ, stdout=output, stderr=output
            )
        await self._until_ready(self.manager.count("READY=1") + 1, "The service does not start")

    async def replace(self, release: str) -> None:
        """SIGHUP; waits until processes of that release serve in place of the others. Raises Failed."""
        before = self._workers()
        times = self.manager.count("READY=1") + 1
        self._signal(signal.SIGHUP)
        await self._until_ready(times, "The reload does not end")
        status = self.manager.status.partition("STATUS=")[2]
        require(
            status == f"GPTutor {release}, {WORKERS} processes serve", f"After a reload for {release} the service says: {status}"
        )
        require(len(self._workers() - before) == WORKERS, "After a reload no new processes serve.")

    async def old_processes_ended(self) -> None:
        await until(lambda: len(self._workers()) == WORKERS, "The processes that were replaced do not end")

    async def stop(self) -> None:
        """Raises Failed."""
        require(
            self._process is not None and self._process.poll() is None, f"The service has ended by itself:\n{self._last_output()}"
        )
        assert self._process is not None
        workers, stops = self._workers(), self.manager.count("STOPPING=1")
        self._signal(signal.SIGTERM)
        try:
            code = await asyncio.to_thread(self._process.wait, STOP_S)
        except subprocess.TimeoutExpired:
            raise Failed(f"The service did not stop within {STOP_S} s.") from None
        require(code == 0, f"The service ended with {code}:\n{self._last_output()}")
        require(self.manager.count("STOPPING=1") == stops + 1, "The service did not tell that it stops.")
        require(not [pid for pid in workers if psutil.pid_exists(pid)], "Processes of the service live on after its end.")

    def close(self) -> None:
        """At the end, however it came about."""
        if self._process is not None and self._process.poll() is None:
            everything = psutil.Process(self._process.pid).children(recursive=True)
            self._process.kill()
            self._process.wait()
            for one in everything:
                if one.is_running():
                    one.kill()
        self.manager.close()

    def errors(self) -> list[dict[str, Any]]:
        """The log lines of errors."""
        lines = [orjson.loads(line) for path in self.logs.glob("combined-*.log") for line in path.read_bytes().splitlines()]
        return [line for line in lines if line.get("level") == "error"]

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _workers(self) -> set[int]:
        assert self._process is not None
        return {child.pid for child in psutil.Process(self._process.pid).children() if "check" not in _command(child)}

    async def _until_ready(self, times: int, sentence: str) -> None:
        process = self._process
        assert process is not None
        await until(lambda: self.manager.count("READY=1") >= times or process.poll() is not None, sentence)
        require(process.poll() is None, f"The service has ended by itself:\n{self._last_output()}")

    def _last_output(self) -> str:
        return "".join(f"    {line}\n" for line in self._output.read_text(errors="replace").splitlines()[-25:])


def _command(process: psutil.Process) -> list[str]:
    try:
        return [str(part) for part in process.cmdline()]
    except psutil.NoSuchProcess:
        return ["check"]
