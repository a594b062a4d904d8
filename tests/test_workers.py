"""Several processes on one port (`server.workers`), and their replacement under load."""

import asyncio
import concurrent.futures
import contextlib
import os
import random
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import orjson
import psutil
import pytest

from gptutor.config.schema import Config, DocsSettings, ServerSettings
from gptutor.server.banner import banner
from gptutor.server.listener import authority
from gptutor.server.workers import Master, Worker
from tests.support.service import RunningSimulator, Service, environment, run, start, start_simulator


def asking(text: str) -> bytes:
    return orjson.dumps({"messages": [{"role": "user", "content": text}]})


ASK, ASK_SLOWLY = asking("Hello"), asking("fault:slow=1.5")


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSimulator]:
    simulator = start_simulator(tmp_path_factory.mktemp("upstream"))
    yield simulator
    simulator.stop()


@pytest.fixture
def workers(tmp_path: Path, upstream: RunningSimulator) -> Iterator[Service]:
    port = free_ports(3)
    metrics = port + 1
    settings = tmp_path / "settings.yaml"
    settings.write_text("rate_limit:\n  chat_per_minute: 0\n")
    service = start(
        tmp_path,
        PORT=str(port),
        GPTUTOR_WORKERS="2",
        GPTUTOR_CONFIG=str(settings),
        GPTUTOR_METRICS__PORT=str(metrics),
        GPTUTOR_LOGS__STDOUT="false",
        OPENROUTER_API_KEY="sk-or-x",
        OPENROUTER_BASE_URL=upstream.base_url,
    )
    wait_until_ready(service)
    yield service
    assert service.stop() == 0
    assert run(service.environ, "verify", check=False).returncode == 0


def free_ports(count: int) -> int:
    """The first of some that stand together, below those that the kernel gives to whoever asks for any (or to one end of a talk)."""
    while True:
        first = random.randrange(10_000, 30_000)
        if all(is_free(first + number) for number in range(count)):
            return first


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def wait_until_ready(service: Service) -> None:
    """Until both are: /ready is answered by whichever came first, and the figures of each are the last thing it opens."""
    for _ in range(200):
        try:
            urllib.request.urlopen(f"{service.url}/ready", timeout=5).close()
            for number in (0, 1):
                completions_of(service, number)
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("they are not ready")


def new_key(service: Service) -> tuple[int, str]:
    user = service.command("user", "create", "--balance", "1000")
    return user["id"], user["apiKey"]


def ask(service: Service, key: str, body: bytes = ASK) -> int:
    """On a connection of its own, so that any worker may take it."""
    request = urllib.request.Request(
        f"{service.url}/v1/chat/completions",
        data=body,
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json", "Connection": "close"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        assert b'"cost"' in response.read()
        status: int = response.status
        return status


def children(service: Service) -> set[int]:
    pids = set()
    for child in psutil.Process(service.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "gptutor" in " ".join(child.cmdline()):
                pids.add(child.pid)
    return pids


def wait_for_others(service: Service, before: set[int]) -> None:
    for _ in range(300):
        now = children(service)
        if len(now) == 2 and now != before and not now & before:
            return
        time.sleep(0.1)
    raise AssertionError(f"{before} are not replaced: {children(service)}")


def completions_of(service: Service, number: int) -> float:
    port = int(service.environ["GPTUTOR_METRICS__PORT"]) + number
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        counts = re.findall(r'^gptutor_completions_total\{outcome="settled"\} (\S+)$', response.read().decode(), re.MULTILINE)
    return sum(map(float, counts))


def test_both_serve_and_one_that_dies_is_replaced(workers: Service) -> None:
    user, key = new_key(workers)
    counts, asked = [0.0], 0
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        while not all(counts) and asked < 600:  # who takes a connection is the kernel's choice
            assert set(pool.map(lambda _: ask(workers, key), range(60))) == {200}
            asked += 60
            time.sleep(0.5)
            counts = [completions_of(workers, number) for number in (0, 1)]
    assert all(counts)
    assert sum(counts) == asked
    before = children(workers)
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)
    for _ in range(100):
        if len(children(workers)) == 2 and children(workers) != before:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("it is not replaced")
    assert {ask(workers, key) for _ in range(10)} == {200}
    assert len(workers.command("user", "ledger", str(user), "--limit", "1000")) == asked + 11


def test_all_are_replaced_under_load_and_no_request_is_lost(workers: Service) -> None:
    user, key = new_key(workers)
    before, ended, statuses = children(workers), threading.Event(), []

    def go_on() -> None:
        while not ended.is_set():
            statuses.append(ask(workers, key))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        going = [pool.submit(go_on) for _ in range(8)]
        try:
            time.sleep(0.5)
            workers.process.send_signal(signal.SIGHUP)
            wait_for_others(workers, before)
            time.sleep(0.5)
        finally:
            ended.set()
        for one in going:
            one.result()  # raises what went wrong
    assert set(statuses) == {200}
    for _ in range(50):
        if len(workers.command("user", "ledger", str(user), "--limit", "10000")) == len(statuses) + 1:
            break
        time.sleep(0.2)
    else:
        raise AssertionError("not all is charged")


@pytest.mark.parametrize(("number", "everybody"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_at_the_end_of_all_what_is_under_way_is_finished_and_charged(
    workers: Service, number: signal.Signals, everybody: bool
) -> None:
    """A service manager tells the first process, a terminal every one of them."""
    user, key = new_key(workers)
    told = [workers.process.pid, *(children(workers) if everybody else ())]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        going = [pool.submit(ask, workers, key, ASK_SLOWLY) for _ in range(8)]
        time.sleep(0.7)
        assert not any(one.done() for one in going)
        for pid in told:
            os.kill(pid, number)
        assert [one.result() for one in going] == [200] * 8
    assert workers.process.wait(30) == 0
    assert len(workers.command("user", "ledger", str(user), "--limit", "100")) == 9


def test_settings_that_are_none_leave_those_of_before_in_force(workers: Service) -> None:
    _, key = new_key(workers)
    settings = Path(workers.environ["GPTUTOR_CONFIG"])
    sound = settings.read_text()
    settings.write_text("relay:\n  no_such: 1\n")
    before = children(workers)
    workers.process.send_signal(signal.SIGHUP)
    wait_for_others(workers, before)
    assert ask(workers, key) == 200
    settings.write_text(sound)


def test_a_reload_takes_what_stands_in_the_folders_own_file_by_then(workers: Service) -> None:
    _, key = new_key(workers)
    assert ask(workers, key) == 200
    file = Path(workers.environ["GPTUTOR_CONFIG"]).with_name("gptutor.env")
    file.write_text("GPTUTOR_BILLING__BALANCE_MIN_RUB=100000\n")
    before = children(workers)
    workers.process.send_signal(signal.SIGHUP)
    wait_for_others(workers, before)
    with pytest.raises(urllib.error.HTTPError, match="402"):
        ask(workers, key)


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1")])
def test_an_address_of_either_kind_is_bound_and_shown(host: str, shown: str) -> None:
    config = Config(server=ServerSettings(host=host, port=3001), docs=DocsSettings(host=host))
    assert Master(config, [bytes(32)]).cfg.address == [(host, 3001)]
    assert authority(host, 3001) == f"{shown}:3001"
    assert f"http://{shown.replace('127.0.0.1', 'localhost')}:8080" in banner(config, url="", demo_key=None)


def test_the_simulator_of_a_trial_has_one_process(tmp_path: Path) -> None:
    ended = run(environment(tmp_path, GPTUTOR_WORKERS="2"), "serve", check=False)
    assert ended.returncode == 1
    assert "needs OPENROUTER_API_KEY" in " ".join(ended.stderr.split())


async def test_a_worker_that_finishes_its_answers_is_not_taken_for_a_hung_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptutor.server.workers.NOTIFY_S", 0.01)
    worker, told = Worker.__new__(Worker), []
    worker.alive = False  # it was told to end
    worker.notify = lambda: told.append(1)
    async with worker._alive_to_the_end():
        await asyncio.sleep(0.1)
    assert len(told) > 3
    count = len(told)
    await asyncio.sleep(0.05)
    assert len(told) == count
