"""Writing the log: JSON lines in `logs/combined-YYYY-MM-DD.log` and on standard output (contract F1, F2).

The event loop only lays records down; a thread spells them and writes them out, many at once, within BATCH_S.
"""

import contextlib
import datetime
import functools
import itertools
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import orjson
from pythonjsonlogger.orjson import OrjsonFormatter

from gptutor.logs import AUDIT, LOGGER, Line, LoggerService

BATCH_S = 0.05
"""For so long records are collected before they are written."""


class DailyFile:
    """`combined-YYYY-MM-DD.log` of the current day (UTC); files older than the retention are deleted."""

    def __init__(self, directory: Path, retention_days: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._retention = datetime.timedelta(days=retention_days)
        self._day = datetime.datetime.now(datetime.UTC).date()
        self._file = self._open()
        self._prune()

    def write(self, day: datetime.date, lines: bytes) -> None:
        """Lines of one day, all of them at once."""
        if day > self._day:
            yesterday, before = self._file, self._day
            self._day = day
            try:
                self._file = self._open()
            except OSError:
                self._day = before  # the old file goes on, and the new one is tried again
                raise
            yesterday.close()
            self._prune()
        self._file.write(lines)
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _open(self) -> BinaryIO:
        path = self._directory / f"combined-{self._day:%Y-%m-%d}.log"
        file = path.open("ab")
        owner = self._directory.stat()
        if os.geteuid() == 0 != owner.st_uid:
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)  # a command run by root must not shut the service out
        return file

    def _prune(self) -> None:
        oldest = f"combined-{self._day - self._retention:%Y-%m-%d}.log"
        for path in self._directory.glob("combined-????-??-??.log"):
            if path.name < oldest:
                with contextlib.suppress(OSError):
                    path.unlink()


@functools.lru_cache(maxsize=2)
def _second(second: int) -> tuple[datetime.date, str]:
    """Many lines have the same one."""
    moment = datetime.datetime.fromtimestamp(second, datetime.UTC)
    return moment.date(), f"{moment:%Y-%m-%d %H:%M:%S}"


class LineFormatter(OrjsonFormatter):
    """The field names and the time format of the contract's example."""

    def __init__(self) -> None:
        super().__init__(["message"])

    def add_fields(self, log_data: dict[str, object], record: logging.LogRecord, message_dict: dict[str, object]) -> None:
        log_data["timestamp"] = _second(int(record.created))[1]
        log_data["level"] = record.levelname.lower()
        super().add_fields(log_data, record, message_dict)

    def line(self, record: logging.LogRecord) -> bytes:
        """With its end."""
        if not isinstance(record, Line):
            return self.format(record).encode() + b"\n"
        said = {
            "timestamp": _second(int(record.created))[1],
            "level": record.levelname.lower(),
            "message": record.msg,
            **record.fields,
        }
        return orjson.dumps(said, option=orjson.OPT_APPEND_NEWLINE)


class Writer(logging.Handler):
    """Takes records without waiting for anything; a thread of its own writes them out."""

    def __init__(self, file: DailyFile, *, stdout: bool) -> None:
        super().__init__()
        self._file = file
        self._stdout = stdout
        self._lines = LineFormatter()
        self._records: deque[logging.LogRecord] = deque()
        self._woken = threading.Event()
        self._hurries = threading.Event()
        self._ends = False
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    def handle(self, record: logging.LogRecord) -> bool:
        """A deque takes from any thread; the standard's lock would only guard it once more."""
        self._records.append(record)
        if record.levelno >= logging.ERROR or record.name == AUDIT.name:
            self._hurries.set()  # what was changed by hand, and what goes wrong, is written at once
        if not self._woken.is_set():
            self._woken.set()
        return True

    def close(self) -> None:
        """Once all is written."""
        self._ends = True
        self._hurries.set()
        self._woken.set()
        self._thread.join()
        self._file.close()
        super().close()

    def _work(self) -> None:
        while not self._ends:
            self._woken.wait()
            self._hurries.wait(BATCH_S)
            self._woken.clear()
            self._hurries.clear()
            self._write()
        self._write()

    def _write(self) -> None:
        spelled: list[tuple[datetime.date, bytes]] = []
        with contextlib.suppress(IndexError):
            while True:
                record = self._records.popleft()
                try:
                    spelled.append((_second(int(record.created))[0], self._lines.line(record)))
                except Exception:
                    self.handleError(record)  # says so on standard error; the other lines must not suffer for it
        for day, lines in itertools.groupby(spelled, key=lambda one: one[0]):
            text = b"".join(line for _, line in lines)
            try:
                self._file.write(day, text)
            except (OSError, ValueError) as error:  # a full disk
                _complain(error)
            if self._stdout:
                try:
                    sys.stdout.write(text.decode())
                    sys.stdout.flush()
                except (OSError, ValueError) as error:  # nobody reads it any more
                    _complain(error)


def _complain(error: Exception) -> None:
    """On standard error, if anybody hears that."""
    with contextlib.suppress(OSError, ValueError):
        print(f"gptutor: a line of the log is lost: {error}", file=sys.stderr)


@contextmanager
def logging_to(directory: Path, *, level: str, retention_days: int, stdout: bool) -> Iterator[LoggerService]:
    """Sets up logging for the life of a process; all lines are written when the context ends."""
    root = logging.getLogger()
    writer = Writer(DailyFile(directory, retention_days), stdout=stdout)
    root.addHandler(writer)
    root.setLevel(logging.WARNING)
    LOGGER.setLevel(level.upper())
    try:
        yield LoggerService()
    finally:
        root.removeHandler(writer)
        writer.close()
