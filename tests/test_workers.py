"""Several processes on one port (`server.workers`), and their replacement under load."""

import base64
import concurrent.futures
import contextlib
import os
import random
import re
import signal
import socket
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
from gptutor.server.listener import host_and_port
from gptutor.server.workers import addresses
from gptutor.telemetry.shared_metrics import FOLDER, TOTALS
from tests.support.gateway import SECRET
from tests.support.service import RunningSimulator, Service, run, start, start_simulator


def completion(text: str) -> bytes:
    return orjson.dumps({"messages": [{"role": "user", "content": text}]})


REQUEST, SLOW_REQUEST = completion("Hello"), completion("fault:slow=1.5")


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSimulator]:
    simulator = start_simulator(tmp_path_factory.mktemp("upstream"))
    yield simulator
    simulator.stop()


@pytest.fixture
def workers(tmp_path: Path, upstream: RunningSimulator, database_url: str) -> Iterator[Service]:
    port = free_ports(2)
    settings = tmp_path / "settings.yaml"
    settings.write_text("rate_limit:\n  chat_per_minute: 0\n")
    service = start(
        tmp_path,
        PORT=str(port),
        GPTUTOR_WORKERS="2",
        GPTUTOR_CONFIG=str(settings),
        GPTUTOR_METRICS__PORT=str(port + 1),
        GPTUTOR_LOGS__STDOUT="false",
        DATABASE_URL=database_url,
        GPTUTOR_SECRET_KEY=base64.b64encode(SECRET).decode(),
        OPENROUTER_API_KEY="sk-or-x",
        OPENROUTER_BASE_URL=upstream.base_url,
    )
    wait_until_ready(service)
    yield service
    assert service.stop() == 0
    assert run(service.environ, "verify", check=False).returncode == 0


def free_ports(count: int) -> int:
    """The first of consecutive free ports, below the range from which the kernel assigns ephemeral ports."""
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
    """Waits for both workers: /ready is answered by either."""
    for _ in range(200):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{service.url}/ready", timeout=5).close()
            if metric(service, 'gptutor_processes{state="answering"}') == 2:
                return
        time.sleep(0.05)
    raise AssertionError("the workers are not ready")


def new_key(service: Service) -> tuple[int, str]:
    user = service.command("user", "create", "--balance", "1000")
    return user["id"], user["apiKey"]


def complete(service: Service, key: str, body: bytes = REQUEST) -> int:
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


SETTLED = 'gptutor_completions_total{outcome="settled"}'


def metric(service: Service, sample: str) -> float:
    """From the one page of all workers; whichever answers."""
    with urllib.request.urlopen(f"http://127.0.0.1:{service.environ['GPTUTOR_METRICS__PORT']}/metrics", timeout=5) as response:
        (found,) = re.findall(rf"^{re.escape(sample)} (\S+)$", response.read().decode(), re.MULTILINE)
    return float(found)


def completions_by_worker(service: Service) -> list[float]:
    """As the latest scrape saw them."""
    totals = orjson.loads((service.directory / "var" / FOLDER / TOTALS).read_bytes())
    return [snapshot["gptutor_completions"][1].get(SETTLED, 0) for snapshot in totals["seen"].values()]


def wait_until_settled(service: Service, count: int) -> None:
    for _ in range(50):
        if metric(service, SETTLED) == count:
            return
        time.sleep(0.1)
    raise AssertionError(f"{metric(service, SETTLED)} of {count} completions are counted")


def test_both_workers_serve_and_a_dead_one_is_replaced(workers: Service) -> None:
    user, key = new_key(workers)
    counts, sent = [0.0], 0
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        while not all(counts) and sent < 600:  # the kernel chooses the worker that accepts a connection
            assert set(pool.map(lambda _: complete(workers, key), range(60))) == {200}
            sent += 60
            wait_until_settled(workers, sent)
            counts = completions_by_worker(workers)
    assert len(counts) == 2
    assert all(counts)
    before = children(workers)
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)
    for _ in range(100):
        if len(children(workers)) == 2 and children(workers) != before:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the dead worker is not replaced")
    assert metric(workers, SETTLED) == sent  # the killed worker's are not lost
    assert metric(workers, "gptutor_process_deaths_total") == 1
    assert {complete(workers, key) for _ in range(10)} == {200}
    wait_until_settled(workers, sent + 10)
    assert len(workers.command("user", "ledger", str(user), "--limit", "1000")) == sent + 11


@pytest.mark.parametrize(("number", "all_processes"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_at_shutdown_running_requests_are_finished_and_charged(
    workers: Service, number: signal.Signals, all_processes: bool
) -> None:
    """A service manager signals the master, a terminal every process."""
    user, key = new_key(workers)
    signalled = [workers.process.pid, *(children(workers) if all_processes else ())]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        going = [pool.submit(complete, workers, key, SLOW_REQUEST) for _ in range(8)]
        time.sleep(0.7)
        assert not any(one.done() for one in going)
        for pid in signalled:
            os.kill(pid, number)
        assert [one.result() for one in going] == [200] * 8
    assert workers.process.wait(30) == 0
    assert len(workers.command("user", "ledger", str(user), "--limit", "100")) == 9


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1")])
def test_an_address_of_either_kind_is_bound_and_shown(host: str, shown: str) -> None:
    config = Config(server=ServerSettings(host=host, port=3001), docs=DocsSettings(host=host))
    assert list(addresses(config)) == [f"{shown}:3001"]
    assert host_and_port(host, 3001) == f"{shown}:3001"
    assert f"http://{shown.replace('127.0.0.1', 'localhost')}:8080" in banner(config, url="", demo_key=None)
