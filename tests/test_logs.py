"""Log files: one per day, retention, and one JSON line per record (contract F1)."""

import datetime
import json
import logging
import os
import stat
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from gptutor.telemetry import logs
from gptutor.telemetry.console import ConsoleWriter
from gptutor.telemetry.line_limit import LineLimit
from gptutor.telemetry.log_files import DailyFile, LogFolder
from gptutor.telemetry.log_writer import logging_to
from tests.support.service import start


def daily_file(directory: Path, *, retention_days: int) -> DailyFile:
    return DailyFile(LogFolder(directory, retention_days, bytes_max=1 << 30, file_bytes_max=1 << 26))


def test_each_day_has_its_file_and_expired_files_are_deleted(tmp_path: Path) -> None:
    for day in ("2020-01-01", "2099-01-30", "2099-01-31"):
        (tmp_path / f"combined-{day}.log").write_text("old")
    (tmp_path / "other.log").write_text("not ours")
    file = daily_file(tmp_path, retention_days=2)
    file.write(datetime.date(2099, 2, 1), b"first\n")
    file.write(datetime.date(2099, 2, 2), b"second\n")
    file.close()
    assert (tmp_path / "combined-2099-02-01.log").read_text() == "first\n"
    assert (tmp_path / "combined-2099-02-02.log").read_text() == "second\n"
    assert {path.name for path in tmp_path.iterdir()} == {
        "combined-2099-01-31.log", "combined-2099-02-01.log", "combined-2099-02-02.log", "other.log",
    }  # fmt: skip


def test_every_record_is_one_json_line_and_is_written_before_logging_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to(tmp_path, level="info", retention_days=1, stdout=True) as log:
        log.http(method="GET", path="/", status=404, request_id="r\n1", duration_ms=2, code="not_found")
        try:
            raise ValueError("a\nb")
        except ValueError:
            logs.LOGGER.exception("It failed")
        logging.getLogger("someone.else").info("not for us")
        logs.LOGGER.debug("not at this level")
    (path,) = tmp_path.glob("combined-*.log")
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(first)[:3] == ["timestamp", "level", "message"]
    assert (first["message"], first["requestId"], first["code"]) == ("HTTP GET / 404", "r\n1", "not_found")
    assert second["level"] == "error"
    assert "ValueError: a\nb" in second["exc_info"]
    assert capsys.readouterr().out == path.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_created_by_root_stays_writable_for_the_service(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)
    daily_file(tmp_path, retention_days=1).close()
    (path,) = tmp_path.iterdir()
    assert path.stat().st_uid == 12345


class BrokenPipe:
    """A stream whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    flush = isatty = write


def test_a_closed_standard_output_does_not_stop_the_log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with logging_to(tmp_path, level="info", retention_days=1, stdout=True) as log:
        monkeypatch.setattr("sys.stdout", BrokenPipe())
        monkeypatch.setattr("sys.stderr", BrokenPipe())
        for number in range(3):
            log.http(method="GET", path=f"/{number}", status=200, request_id="r", duration_ms=1, code=None)
            time.sleep(0.1)
    monkeypatch.undo()
    (path,) = tmp_path.glob("combined-*.log")
    assert len(path.read_text().splitlines()) == 3


def test_a_file_that_cannot_be_opened_is_tried_again(tmp_path: Path) -> None:
    file = daily_file(tmp_path, retention_days=2)
    (tmp_path / "combined-2099-02-01.log").mkdir()
    with pytest.raises(OSError, match="directory"):
        file.write(datetime.date(2099, 2, 1), b"first\n")
    (tmp_path / "combined-2099-02-01.log").rmdir()
    file.write(datetime.date(2099, 2, 1), b"second\n")
    file.close()
    assert (tmp_path / "combined-2099-02-01.log").read_text() == "second\n"


def lines_in(directory: Path) -> list[dict[str, Any]]:
    (path,) = directory.glob("combined-*.log")
    return [json.loads(line) for line in path.read_text().splitlines()]


def lost(destination: str) -> float:
    return REGISTRY.get_sample_value("gptutor_log_lines_lost_total", {"destination": destination}) or 0.0


def test_repeated_errors_are_one_line_and_a_count(tmp_path: Path) -> None:
    with logging_to(tmp_path, level="info", retention_days=1, stdout=False, warnings_per_minute=5):
        for number in range(1000):
            logs.LOGGER.warning("Not ready yet: %s", "refused")
            logs.LOGGER.error("A hold %d could not be closed", number)
            try:
                raise ValueError(number)
            except ValueError:
                logs.LOGGER.exception("It failed")
            logs.audit("cli:root", "topup", reference=str(number))
    lines = lines_in(tmp_path)
    counts = {line["message"]: line["repeated"] for line in lines if "repeated" in line}
    assert counts == {"Not ready yet: refused": 999, "A hold 0 could not be closed": 995, "It failed": 999}
    assert [line["message"] for line in lines].count("Audit: topup") == 1000  # every change has its line
    assert len([line for line in lines if "exc_info" in line]) == 1
    assert len(lines) < 1015


def test_a_minute_later_a_kind_is_written_again_and_the_count_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = LineLimit()
    assert [limit.admits("kind", 2, logging.WARNING, "m", now=now) for now in (0, 1, 2, 3)] == [True, True, False, False]
    assert limit.ended(59.0) == []
    assert [(each.message, each.count) for each in limit.ended(60.0)] == [("m", 2)]
    assert limit.admits("kind", 2, logging.WARNING, "m", now=60)
    assert limit.ended(200.0) == []
    assert not limit.has_suppressed
    monkeypatch.setattr("gptutor.telemetry.line_limit.KINDS_MAX", 10)
    admitted = [limit.admits(number, 1, logging.WARNING, "m", now=300) for number in range(100)]
    assert sum(admitted) == 11  # memory is bounded: the others share one count
    assert sum(each.count for each in limit.ended(400.0)) == 89


def test_refused_requests_have_a_limit_for_each_kind_and_others_have_none(tmp_path: Path) -> None:
    with logging_to(tmp_path, level="info", retention_days=1, stdout=False, refused_per_minute=10) as log:
        for _ in range(100):
            for status, code in ((404, "not_found"), (401, "invalid_key"), (200, None)):
                log.http(
                    method="GET", path="/" + "x" * 7000, status=status, request_id="r", duration_ms=1, code=code, cause="x" * 7000
                )
    lines = lines_in(tmp_path)
    assert [sum(line.get("status") == status for line in lines) for status in (404, 401, 200)] == [10, 10, 100]
    assert {line["message"]: line["repeated"] for line in lines if "repeated" in line} == {
        "HTTP 404 not_found": 90, "HTTP 401 invalid_key": 90,
    }  # fmt: skip
    assert max(len(json.dumps(line)) for line in lines) < 1000
    assert lines[0]["path"] == "/" + "x" * 199 + "…"
    assert lines[0]["cause"] == "x" * 200 + "…"


def test_a_blocked_standard_output_stops_nothing_else(tmp_path: Path) -> None:
    """Row sum-4."""
    service = start(tmp_path)  # its output is a pipe, which nobody reads after the banner
    for _ in range(1500):
        with urllib.request.urlopen(service.url + "/health", timeout=10) as response:
            response.read()
    deadline = time.monotonic() + 5
    while len(service.log()) < 1500 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len([line for line in service.log() if line.get("path") == "/health"]) == 1500
    started = time.monotonic()
    service.process.terminate()
    try:
        assert service.process.wait(timeout=20) == 0
    finally:
        service.process.kill()
        assert service.process.stdout is not None
        service.process.stdout.close()
    assert time.monotonic() - started < 15


def test_what_a_blocked_standard_output_loses_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    before = lost("stdout")
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        console = ConsoleWriter()
        started = time.monotonic()
        for _ in range(100):
            console.write("stdout", b"line\n" * 20_000)
        assert console._queued_bytes <= 4 * 1024 * 1024
        console.close()
        assert time.monotonic() - started < 5
        assert lost("stdout") - before > 1_000_000
        monkeypatch.undo()
        os.close(reader)  # frees the thread
        console._thread.join()


def test_a_full_disk_is_counted_and_ends_nothing_in_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    day = datetime.datetime.now(datetime.UTC).date()
    (tmp_path / f"combined-{day:%Y-%m-%d}.log").symlink_to("/dev/full")
    before = lost("file")
    with logging_to(tmp_path, level="info", retention_days=1, stdout=False):
        logs.audit("cli:root", "topup")
        time.sleep(0.2)
        logs.audit("cli:root", "topup")
    assert lost("file") - before == 2
    assert capsys.readouterr().err.count("log lines were lost: [Errno 28]") == 1


def test_a_line_that_was_cut_by_a_full_disk_does_not_swallow_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = daily_file(tmp_path, retention_days=1)
    day = datetime.datetime.now(datetime.UTC).date()
    write = os.write
    sizes = iter([3])

    def nearly_full(descriptor: int, text: memoryview) -> int:
        for size in sizes:
            return write(descriptor, text[:size])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gptutor.telemetry.log_files.os.write", nearly_full)
    with pytest.raises(OSError, match="space"):
        file.write(day, b"first\n")
    monkeypatch.undo()
    file.write(day, b"second\n")
    file.close()
    (path,) = tmp_path.iterdir()
    assert path.read_text() == "fir\nsecond\n"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o640), (0o077, 0o600)])
def test_log_files_are_not_for_everybody(tmp_path: Path, umask: int, mode: int) -> None:
    previous = os.umask(umask)
    try:
        daily_file(tmp_path / "logs", retention_days=1).close()
    finally:
        os.umask(previous)
    (path,) = (tmp_path / "logs").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_characters_that_control_a_terminal_are_escaped(tmp_path: Path) -> None:
    path = "/\x1b[2J\x7f\x9b31m\u202etxt\u2028\U000e0041ключ"
    with logging_to(tmp_path, level="info", retention_days=1, stdout=False) as log:
        log.http(method="GET", path=path, status=200, request_id="r", duration_ms=1, code=None)
        logs.LOGGER.warning("%s", path)
    (file,) = tmp_path.iterdir()
    assert not set(file.read_text()) & set("\x1b\x7f\x9b\u202e\u2028\U000e0041")
    assert [line.get("path") or line["message"] for line in lines_in(tmp_path)] == [path, path]
