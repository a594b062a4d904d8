"""The files of the log: rotated by size and by day, compressed, deleted by age and by size, and no line is lost (contract F1)."""

import datetime
import fcntl
import gzip
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gptutor.telemetry import logs
from gptutor.telemetry.log_files import CHUNK_BYTES, DailyFile, LogFolder, try_lock
from gptutor.telemetry.log_writer import logging_to

DAY = datetime.date(2099, 2, 1)
LINE = b"x" * 99 + b"\n"


def folder_of(directory: Path, *, bytes_max: int = 100_000, file_bytes_max: int = 1000) -> LogFolder:
    return LogFolder(directory, 30, bytes_max, file_bytes_max)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def text_of(directory: Path) -> bytes:
    """Of all files, in the order of their names, which is that of time."""
    return b"".join(
        gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for path in sorted(directory.iterdir())
        if path.suffix != ".part"
    )


def test_a_file_that_is_too_large_is_closed_and_compressed_and_no_line_is_lost(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    file, lines = DailyFile(folder), [b"%099d\n" % number for number in range(25)]
    finished = [file.write(DAY, line) for line in lines]
    assert [number for number, each in enumerate(finished, 1) if each] == [1, 10, 20]  # first a new day
    assert folder.compress(threading.Event())
    file.close()
    assert names(tmp_path) == ["combined-2099-02-01.001.log.gz", "combined-2099-02-01.002.log.gz", "combined-2099-02-01.log"]
    assert text_of(tmp_path) == b"".join(lines)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_who_has_a_renamed_file_open_goes_on_in_the_new_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    one, other = DailyFile(folder), DailyFile(folder)
    other.write(DAY, b"other's\n")
    assert one.write(DAY, LINE * 10)
    other.write(DAY, b"late\n")
    assert folder.compress(threading.Event())
    other.write(DAY, b"later\n")
    one.write(DAY, b"last\n")
    assert (tmp_path / "combined-2099-02-01.log").read_bytes() == b"late\nlater\nlast\n"
    assert text_of(tmp_path).count(b"\n") == 14
    one.close()
    other.close()


def test_one_process_at_a_time_renames(tmp_path: Path) -> None:
    file = DailyFile(folder_of(tmp_path))
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    file.write(DAY, LINE * 10)
    assert names(tmp_path) == ["combined-2099-02-01.log"]
    os.close(folder)
    file.write(DAY, LINE)
    assert names(tmp_path) == ["combined-2099-02-01.001.log"]
    folder_of(tmp_path).rotate(tmp_path / "combined-2099-02-01.log")  # another process has just done it
    file.write(DAY, LINE)
    folder_of(tmp_path).rotate(tmp_path / "combined-2099-02-01.log")
    file.close()
    assert names(tmp_path) == ["combined-2099-02-01.001.log", "combined-2099-02-01.log"]


def test_who_writes_has_a_lock_that_keeps_compression_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write, excluded = DailyFile(folder_of(tmp_path)), os.write, []

    def observed(descriptor: int, text: memoryview) -> int:
        with open(tmp_path / "combined-2099-02-01.log", "rb") as other:
            excluded.append(not try_lock(other.fileno(), fcntl.LOCK_EX))
        return write(descriptor, text)

    monkeypatch.setattr("gptutor.telemetry.log_files.os.write", observed)
    file.write(DAY, LINE)
    monkeypatch.undo()
    assert excluded == [True]
    with open(tmp_path / "combined-2099-02-01.log", "rb") as other:
        assert try_lock(other.fileno(), fcntl.LOCK_EX)  # and only who writes
    file.close()


def test_a_file_that_is_being_written_is_compressed_later(tmp_path: Path) -> None:
    folder, path = folder_of(tmp_path), tmp_path / "combined-2099-02-01.001.log"
    path.write_bytes(LINE)
    with path.open("ab", buffering=0) as writing:
        fcntl.flock(writing, fcntl.LOCK_SH)  # as a process has, from before it looked at the name until it has written
        assert not folder.compress(threading.Event())
        writing.write(LINE)
    assert folder.compress(threading.Event())
    assert text_of(tmp_path) == LINE * 2


def test_what_a_killed_process_left_half_done_is_done_again(tmp_path: Path) -> None:
    (tmp_path / "combined-2099-02-01.001.log").write_bytes(LINE)
    (tmp_path / "combined-2099-02-01.001.log.gz.part").write_bytes(b"y" * 1000)  # killed while it compressed
    (tmp_path / "combined-2099-02-01.002.log").write_bytes(LINE)
    (tmp_path / "combined-2099-02-01.002.log.gz").write_bytes(gzip.compress(LINE))  # … or before it deleted the original
    assert folder_of(tmp_path).compress(threading.Event())
    assert names(tmp_path) == ["combined-2099-02-01.001.log.gz", "combined-2099-02-01.002.log.gz"]
    assert text_of(tmp_path) == LINE * 2


def test_a_stop_gives_compression_up_and_keeps_the_original(tmp_path: Path) -> None:
    path, stopping = tmp_path / "combined-2099-02-01.001.log", threading.Event()
    path.write_bytes(b"x" * (CHUNK_BYTES + 1))
    wait = stopping.wait
    stopping.wait = lambda timeout=None: stopping.set() or wait(0)  # type: ignore[method-assign, func-returns-value]
    assert not folder_of(tmp_path).compress(stopping)
    assert path.stat().st_size == CHUNK_BYTES + 1
    assert names(tmp_path) == [path.name, f"{path.name}.gz.part"]
    assert folder_of(tmp_path).compress(threading.Event())
    assert names(tmp_path) == [f"{path.name}.gz"]


def test_a_flood_of_one_day_stays_within_the_bound_and_drops_the_oldest(tmp_path: Path) -> None:
    file = DailyFile(folder_of(tmp_path, bytes_max=5000))
    for number in range(200):
        file.write(DAY, b"%099d\n" % number)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5000
    file.close()
    kept = [int(line) for line in text_of(tmp_path).split()]
    assert kept == list(range(kept[0], 200))
    assert len(kept) >= 40


def test_files_of_past_days_are_compressed_at_the_start_and_links_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "combined-2026-01-02.log").write_bytes(LINE)
    (tmp_path / "combined-2026-01-03.log").symlink_to("/dev/null")
    (tmp_path / "notes.log").write_bytes(LINE)
    with logging_to(tmp_path, level="info", retention_days=100_000, stdout=False, compresses=True):
        deadline = time.monotonic() + 10
        while "combined-2026-01-02.001.log.gz" not in names(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert {"combined-2026-01-02.001.log.gz", "combined-2026-01-03.log", "notes.log"} < set(names(tmp_path))
    assert "combined-2026-01-02.log" not in names(tmp_path)


WRITER = """
import sys
import time
from pathlib import Path
from gptutor.telemetry import log_writer, logs
log_writer.BATCH_S = 0
with log_writer.logging_to(
    Path(sys.argv[1]), level="info", retention_days=30, bytes_max=1 << 30, file_bytes_max=20_000, stdout=False, compresses=True
):
    for number in range(2000):
        logs.audit(sys.argv[2], "topup", reference=str(number))
        if number % 50 == 0:
            time.sleep(0.002)  # so that the lines are many writes
"""


def test_no_audit_line_of_several_processes_is_lost_by_rotation_and_compression(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, name]) for name in ("one", "two", "three")]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    assert len(names(tmp_path)) > 20
    assert any(name.endswith(".gz") for name in names(tmp_path))
    lines = [json.loads(line) for line in text_of(tmp_path).splitlines()]
    for name in ("one", "two", "three"):
        assert [int(line["reference"]) for line in lines if line["who"] == name] == list(range(2000))


@pytest.mark.parametrize(
    ("stdout", "is_journal", "written"), [("auto", True, False), ("auto", False, True), (True, True, True), (False, False, False)]
)
def test_what_the_journal_would_keep_a_second_time_is_not_written_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stdout: bool, is_journal: bool, written: bool
) -> None:
    with (tmp_path / "stdout").open("w") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + (not is_journal)}")
        with logging_to(tmp_path / "logs", level="info", retention_days=1, stdout=stdout):
            logs.LOGGER.info("A line")
    monkeypatch.undo()
    assert bool((tmp_path / "stdout").read_text()) is written
    assert len(list((tmp_path / "logs").iterdir())) == 1
