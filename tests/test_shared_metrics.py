"""One page of metrics for several processes: sums are right, and no counter goes down, whichever of them ends, and how."""

import contextlib
import errno
import fcntl
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families

from gptutor.telemetry import shared_metrics as module
from gptutor.telemetry.loop_metrics import LoopCounter, LoopHistogram, OptionalGauge
from gptutor.telemetry.metrics import PROCESSES
from gptutor.telemetry.metrics_page import build_metrics
from gptutor.telemetry.shared_metrics import TOTALS, Member, MetricsBusy, shared_metrics
from gptutor.telemetry.snapshots import decode, dump, encode, load, merge, take_snapshot, to_text, without_gauges


class Process:
    """A member with metrics of its own; several of them are in the test's process."""

    def __init__(self, folder: Path, bounds: tuple[float, ...] = (1, 10)) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = LoopCounter("requests", "", ["kind"], [("a",)], registry=registry)
        self.errors = Counter("errors", "Text with \\ and\na line.", ["code"], registry=registry)
        self.times = LoopHistogram("times", "", ["kind"], bounds=bounds, registry=registry)
        self.running = Gauge("gptutor_in_flight_requests", "", registry=registry)
        self.started = Gauge("process_start_time_seconds", "", registry=registry)
        self.oldest = OptionalGauge("oldest", "", registry=registry)
        registry.register(PROCESSES)
        self.member = Member(folder, lambda: take_snapshot(registry))

    def samples(self) -> dict[str, float]:
        return parsed(self.member.text())

    def die(self) -> None:
        """As by SIGKILL: the kernel closes what it had open, and nothing else happens."""
        self.member._is_leaving = True
        self.member._listener.shutdown(socket.SHUT_RDWR)
        self.member._listener.close()
        self.member._thread.join()
        os.close(self.member._folder)


def parsed(text: bytes) -> dict[str, float]:
    return {
        sample.name + "".join(f",{name}={label}" for name, label in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Process] = []

    def begin(**options: tuple[float, ...]) -> Process:
        started.append(Process(tmp_path / ("long" * 40) / "metrics", **options))
        return started[-1]

    yield begin
    for process in started:
        if not process.member._is_leaving:
            process.member.leave()


def folder_of(process: Process) -> Path:
    return process.member._path


def test_whoever_is_asked_adds_up_all(start: Start) -> None:
    first, second, third = start(), start(), start()
    for number, process in enumerate((first, second, third), 1):
        process.requests.add(("a",), number)
        process.errors.labels('a "quoted" \\ name').inc(number)
        process.times.observe(number * 4, ("x",))
        process.running.set(number)
        process.started.set(number)
        process.oldest.set(number)
    second.requests.add(("b",), 100)
    pages = [process.samples() for process in (first, second, third)]
    assert pages[0] == pages[1] == pages[2]
    page = pages[0]
    assert (page["requests_total,kind=a"], page["requests_total,kind=b"]) == (6, 100)
    assert page['errors_total,code=a "quoted" \\ name'] == 6
    assert [page[f"times_bucket,kind=x,le={bound}"] for bound in ("1.0", "10.0", "+Inf")] == [0, 2, 3]
    assert (page["times_count,kind=x"], page["times_sum,kind=x"]) == (3, 24)
    assert page["gptutor_in_flight_requests"] == 6  # summed
    assert page["process_start_time_seconds"] == 1  # the smallest
    assert page["oldest"] == 3  # the largest
    assert (page["gptutor_processes,state=answering"], page["gptutor_processes,state=silent"]) == (3, 0)


@pytest.mark.parametrize("end", [lambda process: process.member.leave(), Process.die], ids=["stopped", "killed"])
def test_no_counter_goes_down_when_a_process_ends(start: Start, end: Callable[[Process], None]) -> None:
    first, second = start(), start()
    first.requests.add(("a",), 1)
    second.requests.add(("a",), 10)
    second.times.observe(5, ("x",))
    second.running.set(7)
    before = first.samples()
    end(second)
    for _ in range(2):  # the first scrape finds a killed one
        after = first.samples()
        assert after["requests_total,kind=a"] == 11
        assert after["times_bucket,kind=x,le=1.0"] == 0
        assert after["times_bucket,kind=x,le=10.0"] == after["times_count,kind=x"] == 1
        assert after["gptutor_in_flight_requests"] == 0  # it has none any more
        assert after["gptutor_processes,state=answering"] == 1
    assert all(after[name] >= before[name] for name in before if name.startswith(("requests", "times", "errors")))
    assert list(folder_of(first).glob("*.sock")) == [folder_of(first) / f"{first.member._name}.sock"]
    third = start()
    third.requests.add(("a",), 100)
    assert third.samples()["requests_total,kind=a"] == 111
    first.member.leave()
    assert third.samples()["requests_total,kind=a"] == 111


def test_what_a_stopping_process_counts_after_the_last_scrape_is_kept(start: Start) -> None:
    first, second = start(), start()
    first.samples()
    second.requests.add(("a",), 5)
    second.member.leave()
    first.member.leave()
    assert start().samples()["requests_total,kind=a"] == 5


def test_a_killed_process_is_counted_as_a_death(start: Start) -> None:
    first, second = start(), start()
    deaths = REGISTRY.get_sample_value("gptutor_process_deaths_total") or 0
    second.die()
    first.samples()
    first.samples()
    assert (REGISTRY.get_sample_value("gptutor_process_deaths_total") or 0) == deaths + 1


def test_a_silent_process_is_counted_as_it_was_seen(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = start(), start()
    second.requests.add(("a",), 10)
    first.samples()
    monkeypatch.setattr(module, "ANSWERS_S", 0.05)
    waiting = threading.Event()
    second.member._take = lambda: (waiting.wait(2) and {}) or {}
    page = first.samples()
    assert page["requests_total,kind=a"] == 10
    assert (page["gptutor_processes,state=answering"], page["gptutor_processes,state=silent"]) == (1, 1)
    second.member._take = lambda: take_snapshot(second.registry)
    waiting.set()


def test_a_process_whose_metrics_fail_goes_on_answering(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    first, second = start(), start()
    working = second.member._take
    second.member._take = mock.Mock(side_effect=RuntimeError("broken"))
    assert first.samples()["gptutor_processes,state=silent"] == 1
    second.member._take = working
    assert first.samples()["gptutor_processes,state=silent"] == 0
    assert "cannot be read" in caplog.text


def test_without_free_descriptors_a_process_answers_when_there_are_some_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NO_ROOM_PAUSE_S", 0.001)
    first, second = start(), start()
    accept, failures = second.member._listener.accept, [OSError(errno.EMFILE, "x")] * 3

    class Listener:
        def accept(self) -> tuple[socket.socket, object]:
            if failures:
                raise failures.pop()
            return accept()

    listener = second.member._listener
    with mock.patch.object(second.member, "_listener", Listener()):
        first.samples()  # ends the accept() that was waiting
        assert first.samples()["gptutor_processes,state=answering"] == 2
        assert not failures
        second.member._listener = listener
        first.samples()


def test_a_full_disk_does_not_end_the_page(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    first, second = start(), start()
    second.requests.add(("a",), 10)
    first.samples()
    with mock.patch("os.rename", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        assert first.samples()["requests_total,kind=a"] == 10
        second.member.leave()
        assert first.samples()["requests_total,kind=a"] == 10
    assert first.samples()["requests_total,kind=a"] == 10
    assert "No space left" in caplog.text


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"ended": 3, "seen": {}}', b'{"ended": {"x": [1]}, "seen": {}}', b'{"seen": 1}']
)
def test_a_damaged_file_is_begun_again(start: Start, text: bytes) -> None:
    first = start()
    first.requests.add(("a",), 3)
    (folder_of(first) / TOTALS).write_bytes(text)
    assert first.samples()["requests_total,kind=a"] == 3
    assert decode((folder_of(first) / TOTALS).read_bytes())["ended"] == {}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


async def test_a_scrape_that_finds_the_folder_locked_is_refused(
    start: Start, monkeypatch: pytest.MonkeyPatch, aiohttp_client: Any
) -> None:
    monkeypatch.setattr(module, "LOCK_S", 0.02)
    first = start()
    client = await aiohttp_client(build_metrics(first.member.text))
    with locked(folder_of(first)):
        with pytest.raises(MetricsBusy):
            first.member.text()
        response = await client.get("/metrics")
        assert response.status == 503
        second = start()  # it starts all the same
        second.requests.add(("a",), 10)
    first.samples()
    with locked(folder_of(first)):
        second.member.leave()
    assert first.samples()["requests_total,kind=a"] == 10
    assert (await client.get("/metrics")).status == 200


def test_without_a_folder_a_process_shows_its_own_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics").write_text("")
    with shared_metrics(tmp_path / "metrics") as text:
        assert b"\ngptutor_process_starts_total " in text()
    assert "are not included" in caplog.text


def test_a_socket_that_cannot_be_made_leaves_nothing_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with mock.patch.object(socket.socket, "bind", side_effect=OSError(errno.EACCES, "x")), pytest.raises(PermissionError):
        Member(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_folder_is_private(start: Start) -> None:
    folder = folder_of(start())
    assert folder.stat().st_mode & 0o777 == 0o700
    start().samples()
    assert (folder / TOTALS).stat().st_mode & 0o777 == 0o600


def test_histograms_of_another_release_are_left_out(start: Start) -> None:
    old = start(bounds=(1, 5))
    old.times.observe(3, ("x",))
    old.member.leave()
    new = start()
    assert new.samples()["times_count,kind=x"] == 1  # nothing of its own contradicts it yet
    new.times.observe(3, ("x",))
    page = new.samples()
    assert page["times_count,kind=x"] == page["times_bucket,kind=x,le=10.0"] == 1
    assert "times_bucket,kind=x,le=5.0" not in page
    new.member.leave()
    assert start().samples()["times_count,kind=x"] == 1


def test_what_is_kept_of_an_ended_process_has_no_gauges_and_no_counters_of_0(start: Start) -> None:
    process = start()
    process.requests.add(("b",), 2)
    process.times.observe(3, ("x",))
    kept = without_gauges(take_snapshot(process.registry))
    assert {name: family.samples for name, family in kept.items() if name != "times"} == {
        "requests": {'requests_total{kind="b"}': 2},
        "errors": {},
    }
    assert kept["times"].samples['times_bucket{kind="x",le="1.0"}'] == 0  # all bounds, in their order


def test_a_snapshot_survives_json_with_all_numbers_and_names() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("g", "", ["x"], registry=registry)
    for label, number in {"a\nb": float("inf"), 'c"': float("-inf"), "ё": 1e300}.items():
        gauge.labels(label).set(number)
    snapshot = take_snapshot(registry)
    assert load(decode(encode(dump(snapshot)))) == {name: type(one)(one.layout, one.samples) for name, one in snapshot.items()}
    text = to_text(merge(snapshot, [{}])).decode()
    assert re.findall(r"^g\{.*$", text, re.MULTILINE) == ['g{x="a\\nb"} +Inf', 'g{x="c\\""} -Inf', 'g{x="ё"} 1e+300']
    gauge.labels("nan").set(float("nan"))
    assert 'g{x="nan"} NaN' in to_text(take_snapshot(registry)).decode()


def test_scrapes_and_stops_at_the_same_time_count_each_process_once(start: Start) -> None:
    first = start()
    others = [start() for _ in range(4)]
    for process in others:
        process.requests.add(("a",), 1)
    assert first.samples()["requests_total,kind=a"] == 4
    seen: list[float] = []
    done = threading.Event()

    def scrape() -> None:
        while not done.is_set():
            with contextlib.suppress(MetricsBusy):
                seen.append(first.samples()["requests_total,kind=a"])

    threads = [threading.Thread(target=scrape) for _ in range(2)]
    for thread in threads:
        thread.start()
    for process in others:
        process.member.leave()
    done.set()
    for thread in threads:
        thread.join()
    assert set(seen) == {4}
