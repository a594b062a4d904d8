"""Writing the log: JSON lines in `logs/combined-YYYY-MM-DD.log` and on standard output (contract F1, F2).

A request's own lines are spelled at once: their fields are known, and a record for another thread would cost more than the line.
All other records are laid down as they are. A thread spells those, and writes everything out, many lines at once, within BATCH_S.
"""

import contextlib
import datetime
import functools
import itertools
import logging
import operator
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from pythonjsonlogger.orjson import OrjsonFormatter

from gptutor.telemetry.logs import AUDIT, LOGGER, LoggerService, say_by_logging

BATCH_S = 0.05
"""For so long records are collected before they are written."""
LEVELS = {level: logging.getLevelName(level).lower() for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)}


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


class Writer(logging.Handler):
    """Takes lines and records without waiting for anything; a thread of its own writes them out."""

    def __init__(self, file: DailyFile, *, stdout: bool) -> None:
        super().__init__()
        self._file = file
        self._stdout = stdout
        self._formatter = LineFormatter()
        self._laid_down: deque[tuple[float, bytes | logging.LogRecord]] = deque()
        """Each with the second of its making."""
        self._woken = threading.Event()
        self._hurries = threading.Event()
        self._ends = False
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    def say(self, level: int, message: str, fields: dict[str, Any]) -> None:
        """A line of a request; see `logs.Say`."""
        if not LOGGER.isEnabledFor(level):
            return
        now = time.time()
        said = {"timestamp": _second(int(now))[1], "level": LEVELS[level], "message": message, **fields}
        try:
            line = orjson.dumps(said, option=orjson.OPT_APPEND_NEWLINE)
        except orjson.JSONEncodeError:  # half a character in a path
            say_by_logging(level, message, fields)
            return
        self._laid_down.append((now, line))
        if not self._woken.is_set():
            self._woken.set()

    def handle(self, record: logging.LogRecord) -> bool:
        """A deque takes from any thread; the standard's lock would only guard it once more."""
        self._laid_down.append((record.created, record))
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
                created, said = self._laid_down.popleft()
                line = said if isinstance(said, bytes) else self._spelled(said)
                spelled.append((_second(int(created))[0], line))
        for day, lines in itertools.groupby(spelled, key=operator.itemgetter(0)):
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

    def _spelled(self, record: logging.LogRecord) -> bytes:
        try:
            return self._formatter.format(record).encode() + b"\n"
        except Exception:
            self.handleError(record)  # says so on standard error; the other lines must not suffer for it
            return b""


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
        yield LoggerService(writer.say)
    finally:
        root.removeHandler(writer)
        writer.close()
