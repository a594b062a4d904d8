"""Starting, stopping, dying and being packed (contract F8, F9; rows process-2, process-7, operator-1, operator-2)."""

import contextlib
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gptutor import __version__
from gptutor.api.chat.exchange import STOPPED_EVENT
from gptutor.config import schema
from gptutor.server.listener import StartError, listening_on
from gptutor.server.serve import admin_listening, simulated_openrouter
from gptutor.simulator.server import Simulator
from gptutor.web.site import documentation
from tests.support.service import Service, environment, run, running_with, start, start_bare

ROOT = Path(__file__).parent.parent
FAMILIES = (socket.AF_INET, socket.AF_INET6)


def postgres_of(directory: Path) -> list[int]:
    return running_with(f"postgres -D {directory}")


def stream(service: Service, text: str) -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": text}], "stream": True}).encode()
    request = urllib.request.Request(
        f"{service.url}/v1/chat/completions",
        data=body,
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {service.demo_key}"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return bytes(response.read())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_finishes_running_requests_and_settles_their_charges(tmp_path: Path, number: signal.Signals) -> None:
    running = start_bare(tmp_path, GPTUTOR_SIMULATOR__WORD_S="0.03")
    answers: list[bytes] = []
    client = threading.Thread(target=lambda: answers.append(stream(running, "Hello")))
    client.start()
    while not any(line["message"].startswith("LLM Request") for line in running.log()):
        time.sleep(0.02)
    assert running.stop(number) == 0
    client.join()
    assert answers[0].endswith(b"data: [DONE]\n\n")
    assert [line["outcome"] for line in running.log() if "outcome" in line] == ["settled"]
    assert postgres_of(tmp_path) == []
    shown = json.loads(run(running.environ, "user", "show", "1", "--json").stdout)
    assert shown["held"] == "0"
    assert shown["balance"] != "100"


@pytest.mark.parametrize("text", ["Hello", "fault:blanks=100"])
def test_at_the_end_of_a_stop_a_plain_request_gets_an_error_that_is_not_repeated(tmp_path: Path, text: str) -> None:
    """Contract B8; row sum-9: an empty reply would be requested again by every SDK, and bought twice. The charge follows."""
    running = start(tmp_path, GPTUTOR_SIMULATOR__FIRST_WORD_S="3", GPTUTOR_SERVER__SHUTDOWN_S="1")
    (status, headers, document) = answer_during_stop(running, text, stream=False)
    assert (status, headers["X-Error-Code"], headers["x-should-retry"]) == (504, "upstream_timeout", "false")
    assert "Retry-After" not in headers
    assert list(json.loads(document)) == ["error"]
    (line,) = [line for line in running.log() if line["message"].startswith("LLM Response")]
    assert (line["outcome"], "costUsd" in line) == ("upstream_timeout", True)
    assert json.loads(run(running.environ, "user", "show", "1", "--json").stdout)["held"] == "0"


def test_at_the_end_of_a_stop_a_stream_gets_an_error_event_and_is_charged(tmp_path: Path) -> None:
    """Contract B7: it must not look complete, nor break without a word."""
    running = start(tmp_path, GPTUTOR_SIMULATOR__WORD_S="0.1", GPTUTOR_SERVER__SHUTDOWN_S="1")
    status, _, document = answer_during_stop(running, "Hello", stream=True)
    assert status == 200
    assert document.endswith(STOPPED_EVENT)
    assert b"[DONE]" not in document
    (line,) = [line for line in running.log() if line["message"].startswith("LLM Response")]
    assert (line["outcome"], line["cause"]) == ("settled", "the service stopped before the response was complete")
    assert json.loads(run(running.environ, "user", "show", "1", "--json").stdout)["held"] == "0"


def answer_during_stop(service: Service, text: str, *, stream: bool) -> tuple[int, Any, bytes]:
    """Sends a request, stops the service while it runs, and returns the response's status, headers and body."""
    body = json.dumps({"messages": [{"role": "user", "content": text}], "stream": stream}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {service.demo_key}"}
    host, _, port = service.url.removeprefix("http://").partition(":")
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=30)) as connection:
        connection.request("POST", "/v1/chat/completions", body, headers)
        while not any(line["message"].startswith("LLM Request") for line in service.log()):
            time.sleep(0.02)
        time.sleep(0.3)  # the request is upstream by now
        stopping = threading.Thread(target=service.stop)
        stopping.start()
        response = connection.getresponse()
        answer = (response.status, response.headers, response.read())
        stopping.join()
    return answer


def test_after_a_kill_the_service_has_its_database_its_user_and_its_key(tmp_path: Path) -> None:
    first = start_bare(tmp_path)
    stream(first, "Hello")
    first.lines_of(1, 2)
    first.stop(signal.SIGKILL)
    assert postgres_of(tmp_path) != []
    second = start(tmp_path)
    assert second.demo_key == first.demo_key
    assert second.command("user", "show", "1")["balance"] != "100"
    assert second.stop() == 0
    assert postgres_of(tmp_path) == []


def test_the_secrets_of_a_bare_machine_are_readable_by_their_owner_alone(service: Service) -> None:
    for name in ("secret-key", "demo-key"):
        assert (service.directory / "var" / name).stat().st_mode & 0o777 == 0o600


def test_a_busy_port_is_a_sentence(service: Service, tmp_path: Path) -> None:
    port = service.url.rpartition(":")[2]
    ended = run(environment(tmp_path, PORT=port), "serve", check=False)
    assert ended.returncode == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "Is something else running there? The port is set by PORT." in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    assert postgres_of(tmp_path) == []


@pytest.mark.parametrize(
    ("host", "port", "setting", "words"),
    [
        ("127.0.0.1", None, "", r"Cannot listen on 127\.0\.0\.1:\d+: .*\. Is something else running there\?$"),
        ("::1", None, "PORT", r"Cannot listen on \[::1\]:\d+: .*\. Is something else running there\? The port is set by PORT\.$"),
        ("192.0.2.1", 0, "PORT", r"Cannot listen on 192\.0\.2\.1:0: [^?]*\. The port is set by PORT\.$"),
        ("192.0.2.1", 0, "", r"Cannot listen on 192\.0\.2\.1:0: [^?]*\.$"),
    ],
)
async def test_a_failed_listen_names_the_setting_to_change(host: str, port: int | None, setting: str, words: str) -> None:
    """Only a port in use suggests that another program runs there."""
    with socket.create_server((host if port is None else "127.0.0.1", 0), family=FAMILIES[":" in host and port is None]) as taken:
        where = taken.getsockname()[1] if port is None else port
        with pytest.raises(StartError, match=words):
            async with listening_on(web.AppRunner(web.Application()), host, where, setting=setting):
                pass


async def test_every_busy_port_is_reported_with_its_setting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = schema.Config(
            simulator=schema.SimulatorSettings(port=port),
            docs=schema.DocsSettings(port=port),
            admin=schema.AdminSettings(port=port, token="x" * 32),
            paths=schema.PathSettings(data=tmp_path),
        )
        for listening, setting in (
            (simulated_openrouter(Simulator(), config.simulator), "GPTUTOR_SIMULATOR__PORT"),
            (documentation(config), "GPTUTOR_DOCS__PORT"),
            (admin_listening(web.Application(), config), "GPTUTOR_ADMIN__PORT"),
        ):
            with pytest.raises(StartError, match=rf"The port is set by {setting}\.$"):
                async with listening:
                    pass


def test_a_busy_metrics_port_is_reported_with_its_setting(service: Service, tmp_path: Path) -> None:
    port = service.url.rpartition(":")[2]
    ended = run(environment(tmp_path, GPTUTOR_METRICS__PORT=port), "serve", check=False)
    assert ended.returncode == 1
    assert "The port is set by GPTUTOR_METRICS__PORT." in " ".join(ended.stderr.split())


def test_with_database_url_the_service_does_not_migrate(tmp_path: Path, postgres: str) -> None:
    url = postgres.replace("/postgres?", "/template1?")
    environ = environment(tmp_path, DATABASE_URL=url, GPTUTOR_SECRET_KEY="A" * 43 + "=")
    ended = run(environ, "serve", check=False)
    assert ended.returncode == 1
    assert "gptutor migrate" in ended.stderr


def test_the_wheel_is_complete_and_has_the_version(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        symlinks=True,
        ignore=shutil.ignore_patterns(".venv", "var", "logs", ".git", "node_modules", ".*cache", "__pycache__", ".hypothesis"),
    )
    installed_here = ("--no-deps", "--no-build-isolation", "--check-build-dependencies")  # as `make install` builds
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *installed_here, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"gptutor-{__version__}-")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    names = {
        str(path.relative_to(ROOT)) for folder in ("sql", "gptutor") for path in (ROOT / folder).rglob("*.*") if path.is_file()
    }
    expected = {name if name.startswith("gptutor") else f"gptutor/{name}" for name in names if "__pycache__" not in name}
    packed = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert expected - packed == set()
    environ = {**environment(tmp_path), "PYTHONPATH": str(installed)}
    ran = subprocess.run(
        [sys.executable, "-c", "import gptutor; from gptutor.cli.main import app; print(gptutor.__file__); app(['migrate'])"],
        cwd=tmp_path, env=environ, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert str(installed) in ran.stdout
    assert f"Applied to the embedded PostgreSQL in {tmp_path / 'var' / 'postgres'}: 0001_accounts" in ran.stdout


def test_without_a_directory_for_its_journal_the_service_does_not_start(tmp_path: Path, postgres: str) -> None:
    """Row process-11: no service is better than one that can forget what it bought."""
    (tmp_path / "var").mkdir()
    (tmp_path / "var" / "journal").write_text("in the way")
    environ = environment(tmp_path, DATABASE_URL=postgres, GPTUTOR_SECRET_KEY="A" * 43 + "=")
    ended = run(environ, "serve", check=False)
    assert ended.returncode == 1
    assert f"The journal needs the directory {tmp_path / 'var' / 'journal' / '0'}" in ended.stderr
    assert "Traceback" not in ended.stderr
