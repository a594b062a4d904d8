"""Writing the log: JSON lines in `logs/combined-YYYY-MM-DD.log` and on standard output (contract F1, F2). `log_files.py` has the
files.

The lines of LoggerService are serialised at once, by the calling thread: building a LogRecord for another thread would cost more
than serialising. Records of the standard `logging` are queued as they are. A writer thread serialises those, and writes all
queued lines to the file in batches, within BATCH_S; `console.py` has another thread for standard output.

Repeated warnings and errors, and refused requests, are written up to a limit per kind and minute; the others are counted.
"""

import contextlib
import datetime
import functools
import itertools
import logging
import math
import operator
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import orjson
from pythonjsonlogger.orjson import OrjsonFormatter

from gptutor.telemetry.console import ConsoleWriter, stdout_is_journal
from gptutor.telemetry.line_limit import MINUTE_S, LineLimit, kinds_of, message_of
from gptutor.telemetry.log_files import DailyFile, Housekeeper, LogFolder
from gptutor.telemetry.logs import AUDIT_LOGGER, LOGGER, LoggerService, write_line_by_logging
from gptutor.telemetry.metrics import LOG_LINES_LOST
from gptutor.text import escaped_json

BATCH_S = 0.05
"""The longest time that a line waits in the queue before it is written."""
QUEUED_LINES_MAX = 50_000
"""Lines that wait for a disk that hangs; what comes beyond, audit lines excepted, is lost and counted."""
CLOSE_S = 5.0
LOOK_S = 1.0
"""How often the writer looks for counts of repeated lines whose minute is over."""
AUDIT_ROOM_BYTES = 64 * 1024
"""So much must fit on the disk before a change is made whose audit line is to follow."""
LEVELS = {level: logging.getLevelName(level).lower() for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)}


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
    """Queues lines and records without blocking; a writer thread writes them to the file and to standard output.

    Per minute it writes `warnings_per_minute` warnings and errors of one place in the code (identical ones once), and
    `refused_per_minute` lines of each kind of refused request.
    """

    def __init__(
        self,
        file: DailyFile,
        *,
        housekeeper: Housekeeper | None = None,
        stdout: bool,
        warnings_per_minute: int,
        refused_per_minute: int,
        on_lost: Callable[[Exception], None] | None = None,
    ) -> None:
        super().__init__()
        self._file = file
        self._housekeeper = housekeeper
        self._on_lost = on_lost
        self._stdout = stdout
        self._warnings_per_minute = warnings_per_minute
        self._refused_per_minute = refused_per_minute
        self._formatter = LineFormatter()
        self._limit = LineLimit()
        self._console = ConsoleWriter()
        self._queue: deque[tuple[float, bytes | logging.LogRecord]] = deque()
        """Serialised lines and records, each with its Unix time."""
        self._has_lines = threading.Event()
        self._flush_now = threading.Event()
        self._is_closing = False
        self._silent_until = 0.0
        """Until then, further lost lines are not reported."""
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write_line(self, level: int, message: str, fields: dict[str, Any], kind: str | None = None) -> None:
        """Serialises and queues one line; see `logs.WriteLine`."""
        if not LOGGER.isEnabledFor(level):
            return
        now = time.time()
        if kind is not None and not self._limit.admits(kind, self._refused_per_minute, level, kind, time.monotonic()):
            return
        try:
            line = _serialised_line(now, level, message, fields)
        except orjson.JSONEncodeError:  # a lone surrogate, such as in a path; LineFormatter can write it
            write_line_by_logging(level, message, fields)
            return
        self._enqueue(now, line)

    def handle(self, record: logging.LogRecord) -> bool:
        """Queues a record of the standard `logging`. `deque.append` is thread-safe: the lock of Handler.handle is not needed."""
        is_audit = record.name == AUDIT_LOGGER.name
        if record.levelno >= logging.WARNING and not is_audit and not self._admits(record):
            return True
        self._enqueue(record.created, record, always=is_audit)
        if record.levelno >= logging.ERROR or is_audit:
            self._flush_now.set()  # errors and audit lines are written at once
        return True

    def close(self) -> None:
        """Waits until all queued lines are written, but not for a disk or a reader that hangs."""
        self._is_closing = True
        self._flush_now.set()
        self._has_lines.set()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            LOG_LINES_LOST.labels("file").inc(len(self._queue))
        else:
            self._file.close()
        if self._housekeeper is not None:
            self._housekeeper.close()
        self._console.close()
        super().close()

    def _admits(self, record: logging.LogRecord) -> bool:
        identical, alike = kinds_of(record)
        message, now = message_of(record), time.monotonic()
        return self._limit.admits(identical, 1, record.levelno, message, now) and self._limit.admits(
            alike, self._warnings_per_minute, record.levelno, message, now
        )

    def _enqueue(self, created: float, line: bytes | logging.LogRecord, *, always: bool = False) -> None:
        if len(self._queue) >= QUEUED_LINES_MAX and not always:
            LOG_LINES_LOST.labels("file").inc()
            return
        self._queue.append((created, line))
        if not self._has_lines.is_set():
            self._has_lines.set()

    def _run(self) -> None:
        while not self._is_closing:
            if self._has_lines.wait(LOOK_S if self._limit.has_suppressed else None):
                self._flush_now.wait(BATCH_S)
            self._has_lines.clear()
            self._flush_now.clear()
            self._report_repeated(time.monotonic())
            self._write_queue()
        self._report_repeated(math.inf)
        self._write_queue()

    def _report_repeated(self, now: float) -> None:
        for repeated in self._limit.ended(now):
            created = time.time()
            line = _serialised_line(created, repeated.level, repeated.message, {"repeated": repeated.count})
            self._queue.append((created, line))

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
                if self._file.write(day, text) and self._housekeeper is not None:
                    self._housekeeper.file_finished()
            except OSError as error:  # such as a full disk
                self._report_lost_lines(text.count(b"\n"), error)
            if self._stdout:
                self._console.write("stdout", text)

    def _serialised(self, record: logging.LogRecord) -> bytes:
        try:
            return escaped_json(self._formatter.format(record).encode() + b"\n")
        except Exception as error:  # the other lines are still written
            self._report_lost_lines(1, error)
            return b""

    def _report_lost_lines(self, count: int, error: Exception) -> None:
        """To `on_lost`, or on standard error, once a minute; the metric counts all."""
        LOG_LINES_LOST.labels("file").inc(count)
        if self._on_lost is not None:
            self._on_lost(error)
        elif time.monotonic() >= self._silent_until:
            self._silent_until = time.monotonic() + MINUTE_S
            self._console.write("stderr", f"gptutor: log lines were lost: {error}\n".encode())


def _serialised_line(created: float, level: int, message: str, fields: dict[str, Any]) -> bytes:
    """Raises orjson.JSONEncodeError."""
    document = {"timestamp": _date_and_timestamp(int(created))[1], "level": LEVELS[level], "message": message, **fields}
    return escaped_json(orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE))


def require_room(directory: Path) -> None:
    """Writes a file and deletes it: on a full disk a change must not be made, because its audit line would be lost.

    Raises OSError with the directory as its file name.
    """
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(os.urandom(AUDIT_ROOM_BYTES))
            file.flush()
            os.fsync(file.fileno())  # some file systems reserve space only now
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(directory)) from error


@contextmanager
def logging_to(
    directory: Path,
    *,
    level: str,
    retention_days: int,
    bytes_max: int = 1 << 30,
    file_bytes_max: int = 1 << 26,
    stdout: bool | Literal["auto"],
    compresses: bool = False,
    warnings_per_minute: int = 20,
    refused_per_minute: int = 100,
    on_lost: Callable[[Exception], None] | None = None,
) -> Iterator[LoggerService]:
    """Sets up logging for the life of a process; when the context ends, all queued lines are written.

    The lines go to standard output as well if `stdout` is True, or "auto" and standard output is not systemd's journal. With
    `compresses`, for processes that live long, a thread looks after the files. Lines that could not be written are reported to
    `on_lost`, in the writer's thread, or on standard error.
    """
    root = logging.getLogger()
    folder = LogFolder(directory, retention_days, bytes_max, file_bytes_max)
    writer = LogWriter(
        DailyFile(folder),
        housekeeper=Housekeeper(folder) if compresses else None,
        stdout=not stdout_is_journal() if stdout == "auto" else stdout,
        warnings_per_minute=warnings_per_minute,
        refused_per_minute=refused_per_minute,
        on_lost=on_lost,
    )
    root.addHandler(writer)
    root.setLevel(logging.WARNING)
    LOGGER.setLevel(level.upper())
    try:
        yield LoggerService(writer.write_line)
    finally:
        root.removeHandler(writer)
        writer.close()
