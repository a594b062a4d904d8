"""The measured programs: relays that listen on a port, as processes whose CPU time and memory can be measured separately."""

import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.rig import TlsFiles

HERE = Path(__file__).parent
START_S = 60
LITELLM = Path(os.environ.get("LITELLM_VENV", ".venv-litellm"))


@dataclass(frozen=True, slots=True)
class Setup:
    """What a subject is started with: its directory, the simulated OpenRouter, the database, and the file of API keys."""

    directory: Path
    upstream_port: int
    tls: TlsFiles | None
    database_url: str
    keys: Path

    @property
    def base_url(self) -> str:
        scheme, host = ("http", "127.0.0.1") if self.tls is None else ("https", "localhost")
        return f"{scheme}://{host}:{self.upstream_port}/api/v1"

    @property
    def environ(self) -> dict[str, str]:
        trust = {} if self.tls is None else {"SSL_CERT_FILE": str(self.tls.authority)}
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("GPTUTOR_", "OPENROUTER_"))}
        return {**clean, **trust}


@dataclass(slots=True)
class Running:
    """A running subject. `url` is the address of its chat completions."""

    url: str
    process: subprocess.Popen[bytes]
    keys: Path | None = None

    @property
    def processes(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def cpu_s(self) -> float:
        return cpu_s(self.processes)

    def memory_bytes(self) -> int:
        return sum(process.memory_full_info().uss for process in self.processes)


def cpu_s(processes: list[psutil.Process]) -> float:
    """CPU seconds, user and system, of the processes and of their children that have ended."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


@dataclass(frozen=True, slots=True)
class Subject:
    name: str
    start: Callable[[Setup], AbstractContextManager[Running]]
    missing: Callable[[], str | None] = lambda: None
    """The command that installs the program, or None if it is installed."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _running(command: list[str], url: str, environ: dict[str, str], cwd: Path, keys: Path | None = None) -> Iterator[Running]:
    with (cwd / "output").open("ab") as output:
        process = subprocess.Popen(command, env=environ, cwd=cwd, stdout=output, stderr=output)
    try:
        _wait_for(url, process)
        yield Running(url, process, keys)
    finally:
        process.send_signal(signal.SIGINT if "relay.py" in " ".join(command) else signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Waits until the process responds with any status but 503. Raises RuntimeError."""
    root = "/".join(url.split("/")[:3]) + ("/ready" if "gptutor" in str(process.args) else "/")
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(root, timeout=1)
            return
        except urllib.error.HTTPError as error:
            if error.code != 503:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"{process.args!r} does not respond at {root}")


@contextmanager
def bare_relay(setup: Setup) -> Iterator[Running]:
    port = free_port()
    command = [sys.executable, str(HERE / "relay.py"), str(port), f"{setup.base_url}/chat/completions"]
    with _running(command, f"http://127.0.0.1:{port}/v1/chat/completions", setup.environ, setup.directory) as running:
        yield running


@contextmanager
def nginx(setup: Setup) -> Iterator[Running]:
    port = free_port()
    text = (HERE / "nginx.conf").read_text()
    for name, value in {
        "directory": str(setup.directory),
        "port": str(port),
        "upstream": f"127.0.0.1:{setup.upstream_port}",
        "scheme": "http" if setup.tls is None else "https",
        "authority": str(setup.tls.authority) if setup.tls else "/dev/null",
        "verify": "on" if setup.tls else "off",
    }.items():
        text = text.replace(f"@{name}@", value)
    if setup.tls is None:
        text = re.sub(r".*proxy_ssl.*\n", "", text)
    configuration = setup.directory / "nginx.conf"
    configuration.write_text(text)
    command = [str(shutil.which("nginx")), "-p", str(setup.directory), "-c", str(configuration)]
    with _running(command, f"http://127.0.0.1:{port}/v1/chat/completions", setup.environ, setup.directory) as running:
        yield running


def gptutor(workers: int = 1) -> Callable[[Setup], AbstractContextManager[Running]]:
    @contextmanager
    def start(setup: Setup) -> Iterator[Running]:
        port = free_port()
        environ = {
            **setup.environ,
            "PORT": str(port),
            "DATABASE_URL": setup.database_url,
            "OPENROUTER_API_KEY": "sk-or-bench",
            "OPENROUTER_BASE_URL": setup.base_url,
            "GPTUTOR_SECRET_KEY": base64.b64encode(bytes(32)).decode(),
            "GPTUTOR_WORKERS": str(workers),
            "GPTUTOR_RATE_LIMIT__CHAT_PER_MINUTE": "0",
            "GPTUTOR_RATE_LIMIT__CHAT_CONCURRENT_MAX": "0",
            "GPTUTOR_OPENROUTER__CONNECTIONS_MAX": "4000",
        }
        command = [str(Path(sys.executable).with_name("gptutor")), "serve"]
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        with _running(command, url, environ, setup.directory, setup.keys) as running:
            yield running

    return start


@contextmanager
def litellm(setup: Setup) -> Iterator[Running]:
    """LiteLLM's proxy without database and keys: it only relays, and computes the cost."""
    port = free_port()
    (setup.directory / "litellm.yaml").write_text(
        "model_list:\n"
        "  - model_name: google/gemini-2.5-flash-lite\n"
        "    litellm_params:\n"
        "      model: openrouter/google/gemini-2.5-flash-lite\n"
        f"      api_base: {setup.base_url}\n"
        "      api_key: sk-or-bench\n"
    )
    command = [str(LITELLM.resolve() / "bin" / "litellm"), "--config", "litellm.yaml", "--port", str(port), "--num_workers", "1"]
    environ = {**setup.environ, "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
    with _running(command, f"http://127.0.0.1:{port}/v1/chat/completions", environ, setup.directory) as running:
        yield running


def _nginx_missing() -> str | None:
    return None if shutil.which("nginx") else "apt install nginx-light"


def _litellm_missing() -> str | None:
    if (LITELLM / "bin" / "litellm").exists():
        return None
    return f"python3 -m venv {LITELLM} && {LITELLM}/bin/pip install 'litellm[proxy]'"


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("bare relay", bare_relay),
        Subject("gptutor", gptutor()),
        Subject("nginx", nginx, _nginx_missing),
        Subject("litellm", litellm, _litellm_missing),
    )
}
