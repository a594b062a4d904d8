"""The whole service as a process: `gptutor serve`, whose address and demo key are read from its banner."""

import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

from tests.support.forked import Forked, run_forked
from tests.support.postgres import CLUSTER

START_S = 60
STOP_S = 50


def environment(directory: Path, **settings: str) -> dict[str, str]:
    """Environment variables of a service that keeps all its files below `directory` and listens on free ports."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("GPTUTOR_", "OPENROUTER_", "DATABASE_URL"))
    }
    return {
        **clean,
        "PYTHONFAULTHANDLER": "1",
        "SSL_CERT_FILE": os.devnull,  # no service of a test calls an HTTPS server, and reading the system's authorities is slow
        "PORT": "0",
        "GPTUTOR_SIMULATOR__PORT": "0",
        "GPTUTOR_SIMULATOR__WORD_S": "0.001",
        "GPTUTOR_SIMULATOR__FIRST_WORD_S": "0.01",
        "GPTUTOR_PATHS__DATA": str(directory / "var"),
        "GPTUTOR_PATHS__LOGS": str(directory / "logs"),
        **settings,
    }


@dataclass
class Service:
    process: subprocess.Popen[str]
    banner: str
    directory: Path
    environ: dict[str, str]

    @property
    def url(self) -> str:
        return re.search(r"GPTutor +(http://\S+)/v1", self.banner)[1]  # type: ignore[index]

    @property
    def demo_key(self) -> str:
        return re.search(r"sk-user-\S+", self.banner)[0]  # type: ignore[index]

    def command(self, *arguments: str) -> Any:
        """Runs `gptutor <arguments> --json`, and returns the decoded output."""
        return orjson.loads(run(self.environ, *arguments, "--json").stdout)

    def log(self) -> list[dict[str, Any]]:
        (path,) = (self.directory / "logs").glob("combined-*.log")
        return [orjson.loads(line) for line in path.read_text().splitlines()]

    def lines_of(self, user_id: int, count: int) -> list[dict[str, Any]]:
        """The log lines about the user's requests. Waits until there are `count`: they are written after the response is sent."""
        for _ in range(100):
            lines = [line for line in self.log() if line.get("type") == "llm" and line.get("userId") == str(user_id)]
            if len(lines) >= count:
                break
            time.sleep(0.05)
        return lines

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        assert self.process.stdout is not None
        try:
            code = self.process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # faulthandler prints the stacks of its threads
            raise AssertionError(f"the service did not stop:\n{self.process.stdout.read()}") from None
        self.process.stdout.close()
        return code


def running_with(text: str) -> list[int]:
    """The ids of the processes whose command line contains the text."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if text in " ".join(process.info["cmdline"] or []) and process.pid != os.getpid()
    ]


def run(environ: dict[str, str], *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`gptutor <arguments>`, until it ends."""
    ended = run_forked(environ, arguments)
    if check:
        ended.check_returncode()
    return ended


def start(directory: Path, **settings: str) -> Service:
    """Starts the service, with a copy of a migrated database unless `directory` has one or the settings name one."""
    data = directory / "var" / "postgres"
    if "DATABASE_URL" not in settings and not data.exists():
        CLUSTER.copy(data)
    return start_bare(directory, **settings)


def start_bare(directory: Path, program: Sequence[str] = (), /, **settings: str) -> Service:
    """Starts the service, which makes its database if `directory` has none. `program` is another one than this, not forked."""
    environ = environment(directory, **settings)
    outputs: dict[str, Any] = {"env": environ, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*program, "serve"], **outputs) if program else Forked(["serve"], **outputs)
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if "Stop with Ctrl-C" in line or "gptutor user create" in line:
            break
    else:
        raise AssertionError("".join(lines))
    return Service(process, "".join(lines), directory, environ)


@dataclass
class RunningSimulator:
    process: subprocess.Popen[str]
    base_url: str

    def spend(self) -> None:
        """Requests a completion directly from the simulator, which no gateway charges."""
        body = orjson.dumps({"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]})
        request = urllib.request.Request(f"{self.base_url}/chat/completions", data=body, headers={"Authorization": "Bearer x"})
        with urllib.request.urlopen(request, timeout=30) as response:
            response.read()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        assert self.process.stdout is not None
        self.process.stdout.close()


def start_simulator(directory: Path) -> RunningSimulator:
    """Runs `gptutor simulator` as a process."""
    process = Forked(["simulator"], env=environment(directory, PYTHONUNBUFFERED="1"), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return RunningSimulator(process, re.search(r"http://\S+/api/v1", process.stdout.readline())[0])  # type: ignore[index]


def said(service: Service, *arguments: str) -> str:
    """Runs `gptutor <arguments>`, and returns its standard output."""
    return run(service.environ, *arguments).stdout


def refused(environ: dict[str, str], *arguments: str) -> str:
    """Runs a command that fails, and returns its error message."""
    ended = run(environ, *arguments, check=False)
    assert ended.returncode != 0
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    return " ".join(ended.stderr.split())
