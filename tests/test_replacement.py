"""The replacement of the processes at SIGHUP, their stop, and what systemd is told meanwhile: with real processes and sockets."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web

import gptutor
from gptutor import __version__
from gptutor.api.chat.exchange import STOPPED_EVENT
from gptutor.config import schema
from gptutor.database import pool
from gptutor.http.app_keys import READINESS
from gptutor.http.draining import announce_close, drain_connections
from gptutor.http.health import Readiness, health
from gptutor.server import service_manager
from gptutor.server.listener import listening_on_inherited_socket
from gptutor.server.runners import connection_factory, public_runner
from gptutor.server.serve import simulated_openrouter
from gptutor.simulator.server import Simulator
from tests.support.direct_client import DirectClient, read_response
from tests.support.gateway import SECRET, Client, make_client
from tests.support.service import Service, run, start, start_bare
from tests.support.service_manager import ServiceManager

WAIT_S = 60
TOKEN = "t" * 32
PACKAGE = Path(gptutor.__file__).parent


@dataclass
class Managed:
    """A service under a service manager, with a simulated OpenRouter in this process."""

    service: Service
    manager: ServiceManager
    simulator: Simulator
    database: pool.Database
    settings: Path
    clients: list[Client] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.service.url.rpartition(":")[2])

    @property
    def pid(self) -> int:
        return self.service.process.pid

    def workers(self) -> set[int]:
        return {child.pid for child in psutil.Process(self.pid).children() if "check" not in command_of(child)}

    async def client(self) -> Client:
        self.clients.append(await make_client(self.database, "1000"))
        return self.clients[-1]

    def signal(self, number: signal.Signals) -> None:
        self.service.process.send_signal(number)

    def logged(self, text: str) -> list[dict[str, Any]]:
        return [line for line in self.service.log() if text in line["message"]]

    async def metric(self, name: str) -> float:
        """Of the process that answers on the administrators' socket."""
        reader, writer = await asyncio.open_unix_connection(str(self.settings.with_name("admin.sock")))
        writer.write(f"GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n\r\n".encode())
        lines = (await reader.read()).decode().splitlines()
        writer.close()
        return float(next(line for line in lines if line.startswith(f"{name} ")).partition(" ")[2])


def command_of(process: psutil.Process) -> list[str]:
    try:
        return [str(part) for part in process.cmdline()]
    except psutil.NoSuchProcess:
        return []


async def until(condition: Callable[[], bool], message: str) -> None:
    ends_at = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends_at, message
        await asyncio.sleep(0.02)


async def ready(manager: ServiceManager, times: int) -> str:
    """Waits until READY=1 was said so often, and returns the status that it came with."""
    await until(lambda: manager.count("READY=1") >= times, f"READY=1 was not said {times} times: {manager.messages}")
    return manager.status


@pytest.fixture
def options() -> dict[str, Any]:
    """More environment variables of the service, and the `program` by which it is started."""
    return {}


@asynccontextmanager
async def managed_service(
    directory: Path, database_url: str, database: pool.Database, simulator: Simulator, **settings: Any
) -> AsyncIterator[Managed]:
    """Ends with a stop, after which every request must be charged by its bill and all invariants hold."""
    simulator.word_s, simulator.first_word_s = 0.001, 0.01
    manager = ServiceManager(directory / "notify")
    file = directory / "settings.yaml"
    file.write_text("rate_limit:\n  chat_per_minute: 0\n")
    async with simulated_openrouter(simulator, schema.SimulatorSettings(port=0)) as base_url:
        service = await asyncio.to_thread(
            start_bare,
            directory,
            settings.pop("program", ()),
            **{
                "NOTIFY_SOCKET": manager.address,
                "WATCHDOG_USEC": "60000000",
                "DATABASE_URL": database_url,
                "OPENROUTER_API_KEY": "sk-or-x",
                "OPENROUTER_BASE_URL": base_url,
                "GPTUTOR_SECRET_KEY": base64.b64encode(SECRET).decode(),
                "GPTUTOR_CONFIG": str(file),
                "GPTUTOR_LOGS__STDOUT": "false",
                "GPTUTOR_SERVER__KEEPALIVE_GRACE_S": "1",
                "GPTUTOR_ADMIN__SOCKET": str(directory / "admin.sock"),
                "GPTUTOR_ADMIN__TOKEN": TOKEN,
                **settings,
            },
        )
        managed = Managed(service, manager, simulator, database, file)
        try:
            await ready(manager, 1)
            yield managed
        finally:
            file.write_text("")
            with contextlib.suppress(ProcessLookupError):
                managed.signal(signal.SIGTERM)
            code = await asyncio.to_thread(service.process.wait, WAIT_S)
            assert service.process.stdout is not None
            output = service.process.stdout.read()
            service.process.stdout.close()
            stops = manager.count("STOPPING=1")
            manager.close()
        assert code == 0, output
        assert stops == 1
        assert (await asyncio.to_thread(run, service.environ, "verify")).returncode == 0


@pytest.fixture
async def managed(
    tmp_path: Path, database_url: str, database: pool.Database, simulator: Simulator, options: dict[str, Any]
) -> AsyncIterator[Managed]:
    async with managed_service(tmp_path, database_url, database, simulator, **options) as running:
        yield running


async def complete_once(
    managed: Managed, client: Client, text: str = "Hi", *, stream: bool = False
) -> tuple[int, dict[str, str], bytes]:
    direct = DirectClient(managed.port, client.key)
    try:
        return await direct.complete(text, stream=stream)
    finally:
        direct.close()


@dataclass
class Load:
    """About 100 requests a second: plain and streamed, on connections that are kept and on new ones."""

    managed: Managed
    client: Client
    period_s: float = 0.15
    answers: list[tuple[int, bytes]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    is_over: bool = False

    async def run(self) -> None:
        kinds = [{"stream": number % 2 == 1, "close": number % 3 == 2} for number in range(15)]
        async with asyncio.TaskGroup() as tasks:
            for number, kind in enumerate(kinds):
                tasks.create_task(self._one(number, **kind))

    async def _one(self, number: int, *, stream: bool, close: bool) -> None:
        direct = DirectClient(self.managed.port, self.client.key)
        await asyncio.sleep(self.period_s * number / 15)
        while not self.is_over:
            began = time.monotonic()
            try:
                status, _, body = await direct.complete(stream=stream, close=close)
                self.answers.append((status, body[-16:] if stream else b""))
            except (OSError, EOFError) as error:
                self.errors.append(repr(error))
                direct.close()
            await asyncio.sleep(max(0.0, self.period_s - (time.monotonic() - began)))
        direct.close()


@pytest.mark.timeout(300)  # a busy machine needs a second of CPU for each start of Python
async def test_five_replacements_under_load_lose_no_request(managed: Managed) -> None:
    """Neither connections that are kept nor new ones see anything of it, and every request is charged by its bill."""
    client = await managed.client()
    load = Load(managed, client)
    running = asyncio.create_task(load.run())
    await asyncio.sleep(0.3)
    for number in range(5):
        before = managed.workers()
        managed.signal(signal.SIGHUP)
        await ready(managed.manager, number + 2)
        now = managed.workers()
        assert len(now - before) == 1, "a new process serves"
    await asyncio.sleep(0.3)
    load.is_over = True
    await running
    assert load.errors == []
    assert {status for status, _ in load.answers} == {200}
    assert {end for _, end in load.answers} == {b"", b"\n\ndata: [DONE]\n\n"[-16:]}
    assert len(load.answers) > 100
    assert managed.manager.count("RELOADING=1\nMONOTONIC_USEC=") == 5
    assert managed.service.process.poll() is None, "the main process is the same"
    assert managed.logged("has started")
    assert len(managed.logged("Reloaded: 1 new process ")) == 5
    await until(lambda: len(managed.workers()) == 1, "the old processes have not ended")
    assert await client.balance() == Decimal(1000) - managed.simulator.billing.total_usd() * 90
    assert len(managed.simulator.billing.records) == len(load.answers)


# -- reloads that are refused


async def test_a_reload_that_cannot_succeed_keeps_what_serves_and_says_why(managed: Managed, tmp_path: Path) -> None:
    client = await managed.client()
    before = managed.workers()
    started_at = await managed.metric("gptutor_last_reload_timestamp_seconds")
    assert await managed.metric("gptutor_last_reload_success") == 1
    sound = managed.settings.read_text()
    journal_slot = tmp_path / "var" / "journal" / "1"

    async def refused(times: int, text: str) -> None:
        managed.signal(signal.SIGHUP)
        assert text in await ready(managed.manager, times)
        (line,) = managed.logged(text)
        assert line["level"] == "error"
        assert managed.workers() & before == before
        assert (await complete_once(managed, client))[0] == 200

    # The new program finds it: an address cannot be bound. The processes that go on are those of the program before.
    managed.settings.write_text(f"{sound}server:\n  host: 192.0.2.1\n")  # of documentation: no machine has it
    await refused(2, "Cannot listen on 192.0.2.1")
    assert await managed.metric("gptutor_last_reload_success") == 0
    assert await managed.metric("gptutor_last_reload_timestamp_seconds") > started_at

    # `gptutor check` finds it.
    managed.settings.write_text("relay:\n  no_such: 1\n")
    await refused(3, "relay.no_such is not a setting")
    managed.settings.write_text(sound)

    # A new process finds it: its journal cannot be opened.
    journal_slot.write_text("")
    await refused(4, f"The journal needs the directory {journal_slot}")
    journal_slot.unlink()

    managed.signal(signal.SIGHUP)
    await ready(managed.manager, 5)
    await until(lambda: not managed.workers() & before, "the old process goes on")
    assert await managed.metric("gptutor_last_reload_success") == 1
    assert (await complete_once(managed, client))[0] == 200

    # What dies after a refused reload is replaced, although its new listener is missing.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        managed.settings.write_text(f"{sound}metrics:\n  port: {port}\n")
        managed.signal(signal.SIGHUP)
        assert f"Cannot listen on 127.0.0.1:{port}" in await ready(managed.manager, 6)
        for pid in managed.workers():
            os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(WAIT_S):
            assert (await complete_once(managed, client))[0] == 200
    managed.settings.write_text(sound)
    managed.signal(signal.SIGHUP)
    await ready(managed.manager, 7)
    assert len(managed.logged(" died")) == 1, "the one that was killed"


# -- a new release, and a stop in the middle


def release(directory: Path, version: str) -> Path:
    """A folder with the package, made of links but for its version, and with a program that imports it from there."""
    (directory / "gptutor").mkdir(parents=True)
    for path in PACKAGE.iterdir():
        if path.name not in ("__init__.py", "__pycache__"):
            (directory / "gptutor" / path.name).symlink_to(path)
    (directory / "gptutor" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    program = directory / "gptutor-program"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\nsys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))\n"
        "from gptutor.cli.main import main\nmain()\n"
    )
    program.chmod(0o755)
    return directory


async def test_a_reload_takes_a_new_release_and_settings_over_and_a_stop_meanwhile_waits_for_both_generations(
    tmp_path: Path, database_url: str, database: pool.Database, simulator: Simulator
) -> None:
    current = tmp_path / "current"
    current.symlink_to(release(tmp_path / "old", __version__))
    program = [str(current / "gptutor-program")]
    patient = {"GPTUTOR_SERVER__BODY_IDLE_S": "60", "GPTUTOR_SERVER__SHUTDOWN_S": "60"}
    async with managed_service(tmp_path, database_url, database, simulator, program=program, **patient) as managed:
        client = await managed.client()
        (old,) = managed.workers()
        assert await version_of(managed) == __version__
        on_old = DirectClient(managed.port, client.key)
        assert (await on_old.complete())[1].get("connection") is None
        assert on_old.connection is not None
        old_reader, old_writer = on_old.connection
        request = on_old.request("Hi", stream=False)
        old_writer.write(request[:-5])  # the rest follows when the process is being replaced, and is being stopped

        release(tmp_path / "new", "9.9.9")
        current.unlink()
        current.symlink_to(tmp_path / "new")
        (tmp_path / "gptutor.env").write_text("GPTUTOR_WORKERS=2\n")
        managed.signal(signal.SIGHUP)
        assert "GPTutor 9.9.9, 2 processes serve" in await ready(managed.manager, 2)
        assert await version_of(managed) == "9.9.9"
        assert managed.logged(f"2 new processes of GPTutor 9.9.9 serve, in place of {__version__}")
        both_generations = managed.workers()
        assert both_generations > {old}, "it waits for the rest of a request"

        on_new = asyncio.create_task(complete_once(managed, client, "fault:slow=1", stream=True))
        await until(lambda: len(managed.logged("LLM Request")) == 2, "the request has not arrived")
        managed.signal(signal.SIGTERM)
        assert (await on_new)[0] == 200
        await asyncio.sleep(0.2)
        assert managed.service.process.poll() is None, "it waits for the old process"
        old_writer.write(request[-5:])
        assert await asyncio.to_thread(managed.service.process.wait, WAIT_S) == 0
        assert [pid for pid in both_generations if psutil.pid_exists(pid)] == []
        status, headers, _ = await read_response(old_reader)
        assert (status, headers["connection"]) == (200, "close")
        on_old.close()
    assert await client.balance() == Decimal(1000) - simulator.billing.total_usd() * 90
    assert len(simulator.billing.records) == 3


async def version_of(managed: Managed) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", managed.port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    _, _, body = await read_response(reader)
    writer.close()
    return str(json.loads(body)["version"])


# -- the end of a stop


@pytest.mark.parametrize("options", [{"GPTUTOR_SERVER__SHUTDOWN_S": "2", "GPTUTOR_SERVER__DRAIN_S": "1"}])
async def test_at_the_end_of_a_stop_every_unfinished_request_gets_its_error(managed: Managed) -> None:
    """Contract B7 and B8: none is empty, and none is bought again."""
    client = await managed.client()
    plain = [asyncio.create_task(complete_once(managed, client, "fault:slow=30")) for _ in range(5)]
    streams = [asyncio.create_task(complete_once(managed, client, "fault:stall=3", stream=True)) for _ in range(5)]
    await until(lambda: len(managed.logged("LLM Request")) == 10, "the requests have not arrived")
    await asyncio.sleep(0.5)  # the streams have begun
    managed.signal(signal.SIGTERM)
    for status, headers, body in await asyncio.gather(*plain):
        assert (status, headers["x-error-code"], headers["x-should-retry"]) == (504, "upstream_timeout", "false")
        assert list(json.loads(body)) == ["error"]
        assert headers["connection"] == "close"
    for status, _, body in await asyncio.gather(*streams):
        assert status == 200
        assert body.endswith(STOPPED_EVENT)
        assert b"[DONE]" not in body


# -- the watchdog


@pytest.mark.parametrize("options", [{"WATCHDOG_USEC": "8000000"}])
async def test_a_hung_event_loop_stops_the_messages_of_the_watchdog_until_it_is_replaced(managed: Managed) -> None:
    manager = managed.manager
    count = manager.count("WATCHDOG=1")
    await until(lambda: manager.count("WATCHDOG=1") > count, "there are no messages")
    (hung,) = managed.workers()
    count = manager.count("WATCHDOG=1")
    os.kill(hung, signal.SIGSTOP)
    await until(lambda: bool(managed.logged(f"The event loop of process {hung} has not run")), "it is not noticed")
    assert manager.count("WATCHDOG=1") == count
    await until(lambda: manager.count("WATCHDOG=1") > count, "it is not replaced")
    assert hung not in managed.workers()


async def test_a_single_process_sends_the_messages_of_the_watchdog_from_its_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(ServiceManager(tmp_path / "notify")) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        monkeypatch.setenv("WATCHDOG_USEC", "40000")
        async with service_manager.watched_event_loop():
            await until(lambda: manager.count("WATCHDOG=1") > 2, "there are no messages")
            count = manager.count("WATCHDOG=1")
            time.sleep(0.05)  # noqa: ASYNC251 - the event loop hangs
            assert manager.count("WATCHDOG=1") == count


def test_messages_reach_a_socket_with_an_abstract_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"gptutor-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{name}")
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        service_manager.notify_ready("two\nlines")
        assert receiver.recv(100) == b"READY=1\nSTATUS=two lines"
        service_manager.notify_stopping()
        assert receiver.recv(100).startswith(b"STOPPING=1\n")
    service_manager.notify_watchdog()  # nobody listens any more: no error


# -- a single process


def test_a_single_process_ends_at_sighup_only_if_it_could_start_again(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("")
    with contextlib.closing(ServiceManager(tmp_path / "notify")) as manager:
        running = start(tmp_path, GPTUTOR_CONFIG=str(settings), NOTIFY_SOCKET=manager.address)
        settings.write_text("relay:\n  no_such: 1\n")
        running.process.send_signal(signal.SIGHUP)
        ends_at = time.monotonic() + WAIT_S
        while manager.count("READY=1") < 2 and time.monotonic() < ends_at:
            time.sleep(0.02)
        assert "relay.no_such is not a setting" in manager.messages[-1]
        assert running.process.poll() is None
        while not any("The reload is refused" in line["message"] for line in running.log()):
            assert time.monotonic() < ends_at, "the log does not say why"
            time.sleep(0.02)
        settings.write_text("")
        assert running.stop(signal.SIGHUP) == 0
        assert [message.partition("\n")[0] for message in manager.read()] == [
            *("READY=1", "RELOADING=1", "READY=1"),
            *("RELOADING=1", "STOPPING=1"),
        ]


# -- connections of a process that drains


@asynccontextmanager
async def draining_server(tmp_path: Path, idle_s: float) -> AsyncIterator[tuple[int, Readiness, asyncio.Event]]:
    """A port with `/health`, and `/slow`, which answers when the event is set. At the end of the context the server drains."""
    app = web.Application()
    readiness = app[READINESS] = Readiness()
    app.on_response_prepare.append(announce_close)
    go_on = asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        await go_on.wait()
        return web.Response(text="slow")

    async def retire(server: web.Server) -> None:
        readiness.drain(20)
        await drain_connections(server, idle_s=idle_s, total_s=20)

    app.router.add_get("/health", health)
    app.router.add_get("/slow", slow)
    config = schema.Config()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        async with listening_on_inherited_socket(
            public_runner(app, 1), listener.dup(), connection_factory(config), retire=retire
        ):
            yield port, readiness, go_on


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def test_requests_on_a_connection_that_is_kept_are_answered_while_the_process_drains(tmp_path: Path) -> None:
    """Also several at once: only the last response says that it is the last."""
    async with contextlib.AsyncExitStack() as stack:
        port, readiness, go_on = await stack.enter_async_context(draining_server(tmp_path, idle_s=20))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get("/health"))
        assert "connection" not in (await read_response(reader))[1]
        draining = asyncio.create_task(stack.aclose())
        await until(lambda: readiness.is_draining, "it does not drain")
        writer.write(get("/slow") + get("/health") + get("/slow"))
        await asyncio.sleep(0.1)
        go_on.set()
        answers = [await read_response(reader) for _ in range(3)]
        assert [status for status, _, _ in answers] == [200] * 3
        assert [headers.get("connection") for _, headers, _ in answers] == [None, None, "close"]
        assert await reader.read() == b""
        writer.close()
        began = time.monotonic()
        await draining
        assert time.monotonic() - began < 10, "nothing is left to wait for"


async def test_an_idle_connection_is_closed_after_its_time_and_a_running_request_is_not(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        port, readiness, go_on = await stack.enter_async_context(draining_server(tmp_path, idle_s=0.3))
        idle, idle_writer = await asyncio.open_connection("127.0.0.1", port)
        busy, busy_writer = await asyncio.open_connection("127.0.0.1", port)
        busy_writer.write(get("/slow"))
        await asyncio.sleep(0.1)
        draining = asyncio.create_task(stack.aclose())
        await until(lambda: readiness.is_draining, "it does not drain")
        async with asyncio.timeout(5):  # less than the time for the headers of a first request
            assert await idle.read() == b""
        go_on.set()
        assert (await read_response(busy))[2] == b"slow"
        await draining
        idle_writer.close()
        busy_writer.close()
