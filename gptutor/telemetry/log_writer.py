"""Writing the log: JSON lines in `logs/combined-YYYY-MM-DD.log` and on standard output (contract F1, F2).

The lines of LoggerService are serialised at once, by the calling thread: building a LogRecord for another thread would cost more
than serialising. Records of the standard `logging` are queued as they are. A writer thread serialises those, and writes all
queued lines in batches, within BATCH_S.
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

from gptutor.telemetry.logs import AUDIT_LOGGER, LOGGER, LoggerService, write_line_by_logging

BATCH_S = 0.05
"""The longest time that a line waits in the queue before it is written."""
LEVELS = {level: logging.getLevelName(level).lower() for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)}


class DailyFile:
    """`combined-YYYY-MM-DD.log` of the current day (UTC). Files older than `retention_days` are deleted."""

    def __init__(self, directory: Path, retention_days: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._retention = datetime.timedelta(days=retention_days)
        self._day = datetime.datetime.now(datetime.UTC).date()
        self._file = self._open()
        self._prune()

    def write(self, day: datetime.date, lines: bytes) -> None:
        """Appends lines that were logged on `day`. Opens a new file when the day changes. Raises OSError."""
        if day > self._day:
            previous_file, previous_day = self._file, self._day
            self._day = day
            try:
                self._file = self._open()
            except OSError:
                self._day = previous_day  # the next call tries to open the new file again
                raise
            previous_file.close()
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
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)  # the service must be able to append to a file created by root
        return file

    def _prune(self) -> None:
        oldest = f"combined-{self._day - self._retention:%Y-%m-%d}.log"
        for path in self._directory.glob("combined-????-??-??.log"):
            if path.name < oldest:
                with contextlib.suppress(OSError):
                    path.unlink()


@functools.lru_cache(maxsize=2)
def _date_and_timestamp(unix_second: int) -> tuple[datetime.date, str]:
    """Cached, because many lines are logged within the same second."""
    moment = datetime.datetime.fromtimestamp(unix_second, datetime.UTC)
    return moment.date(), f"{moment:%Y-%m-%d %H:%M:%S}"


class LineFormatter(OrjsonFormatter):
    """Field names and time format as in the contract's example (F1)."""

    def __init__(self) -> None:
        super().__init__(["message"])

    def add_fields(self, log_data: dict[str, object], record: logging.LogRecord, message_dict: dict[str, object]) -> None:
        log_data["timestamp"] = _date_and_timestamp(int(record.created))[1]
        log_data["level"] = record.levelname.lower()
        super().add_fields(log_data, record, message_dict)


class LogWriter(logging.Handler):
    """Queues lines and records without blocking; a writer thread writes them to the file and to standard output."""

    def __init__(self, file: DailyFile, *, stdout: bool) -> None:
        super().__init__()
        self._file = file
        self._stdout = stdout
        self._formatter = LineFormatter()
        self._queue: deque[tuple[float, bytes | logging.LogRecord]] = deque()
        """Serialised lines and records, each with its Unix time."""
        self._has_lines = threading.Event()
        self._flush_now = threading.Event()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write_line(self, level: int, message: str, fields: dict[str, Any]) -> None:
        """Serialises and queues one line; see `logs.WriteLine`."""
        if not LOGGER.isEnabledFor(level):
            return
        now = time.time()
        document = {"timestamp": _date_and_timestamp(int(now))[1], "level": LEVELS[level], "message": message, **fields}
        try:
            line = orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)
        except orjson.JSONEncodeError:  # a lone surrogate, such as in a path; LineFormatter can write it
            write_line_by_logging(level, message, fields)
            return
        self._queue.append((now, line))
        if not self._has_lines.is_set():
            self._has_lines.set()

    def handle(self, record: logging.LogRecord) -> bool:
        """Queues a record of the standard `logging`. `deque.append` is thread-safe: the lock of Handler.handle is not needed."""
        self._queue.append((record.created, record))
        if record.levelno >= logging.ERROR or record.name == AUDIT_LOGGER.name:
            self._flush_now.set()  # errors and audit lines are written at once
        if not self._has_lines.is_set():
            self._has_lines.set()
        return True

    def close(self) -> None:
        """Waits until all queued lines are written."""
        self._is_closing = True
        self._flush_now.set()
        self._has_lines.set()
        self._thread.join()
        self._file.close()
        super().close()

    def _run(self) -> None:
        while not self._is_closing:
            self._has_lines.wait()
            self._flush_now.wait(BATCH_S)
            self._has_lines.clear()
            self._flush_now.clear()
            self._write_queue()
        self._write_queue()

    def _write_queue(self) -> None:
        dated: list[tuple[datetime.date, bytes]] = []
        with contextlib.suppress(IndexError):
            while True:
                created, queued = self._queue.popleft()
                line = queued if isinstance(queued, bytes) else self._serialised(queued)
                dated.append((_date_and_timestamp(int(created))[0], line))
        for day, lines in itertools.groupby(dated, key=operator.itemgetter(0)):
            text = b"".join(line for _, line in lines)
            try:
                self._file.write(day, text)
            except (OSError, ValueError) as error:  # such as a full disk
                _report_lost_lines(error)
            if self._stdout:
                try:
                    sys.stdout.write(text.decode())
                    sys.stdout.flush()
                except (OSError, ValueError) as error:  # the reader of standard output is gone
                    _report_lost_lines(error)

    def _serialised(self, record: logging.LogRecord) -> bytes:
        try:
            return self._formatter.format(record).encode() + b"\n"
        except Exception:
            self.handleError(record)  # reports the record on standard error; the other lines are still written
            return b""


def _report_lost_lines(error: Exception) -> None:
    """Reports on standard error; if that is closed as well, does nothing."""
    with contextlib.suppress(OSError, ValueError):
        print(f"gptutor: log lines were lost: {error}", file=sys.stderr)


@contextmanager
def logging_to(directory: Path, *, level: str, retention_days: int, stdout: bool) -> Iterator[LoggerService]:
    """Sets up logging for the life of a process; when the context ends, all queued lines are written."""
    root = logging.getLogger()
    writer = LogWriter(DailyFile(directory, retention_days), stdout=stdout)
    root.addHandler(writer)
    root.setLevel(logging.WARNING)
    LOGGER.setLevel(level.upper())
    try:
        yield LoggerService(writer.write_line)
    finally:
        root.removeHandler(writer)
        writer.close()
