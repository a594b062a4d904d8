"""Standard output and standard error, written by a thread of its own: a reader that stops reading blocks nothing else."""

import contextlib
import os
import select
import sys
import threading
from collections import deque
from typing import Literal

from gptutor.telemetry.metrics import LOG_LINES_LOST

BYTES_MAX = 4 * 1024 * 1024
"""The most that waits to be written; what comes beyond is lost and counted."""
CLOSE_S = 2.0
NOTICE_S = 1.0

Stream = Literal["stdout", "stderr"]


class ConsoleWriter:
    def __init__(self) -> None:
        self._queue: deque[tuple[Stream, bytes]] = deque()
        self._queued_bytes = 0
        self._lock = threading.Lock()
        self._has_text = threading.Event()
        self._is_closing = False
        # A daemon: a blocked thread must not delay the exit.
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)
        self._thread.start()

    def write(self, stream: Stream, text: bytes) -> None:
        """Queues whole lines; never blocks."""
        with self._lock:
            is_full = self._queued_bytes + len(text) > BYTES_MAX
            if not is_full:
                self._queued_bytes += len(text)
                self._queue.append((stream, text))
        if is_full:
            _count_lost(stream, text)
        self._has_text.set()

    def close(self) -> None:
        """Waits until all is written, at most CLOSE_S."""
        self._is_closing = True
        self._has_text.set()
        self._thread.join(CLOSE_S)
        with contextlib.suppress(IndexError):  # the thread may go on at this moment
            while True:
                _count_lost(*self._queue.popleft())

    def _run(self) -> None:
        while self._queue or not self._is_closing:
            self._has_text.wait()
            if not self._is_closing:
                self._has_text.clear()
            with contextlib.suppress(IndexError):  # `close` may empty the queue meanwhile
                while True:
                    self._write_next()

    def _write_next(self) -> None:
        """Raises IndexError if nothing is queued."""
        stream, text = self._queue.popleft()
        _write_or_count(stream, text)
        with self._lock:
            self._queued_bytes -= len(text)


def stdout_is_journal() -> bool:
    """Whether standard output is systemd's journal, which then keeps what is written there (systemd.exec, JOURNAL_STREAM)."""
    try:
        status = os.fstat(sys.stdout.fileno())
    except (AttributeError, OSError, ValueError):  # not a file of the operating system
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def print_notice(text: str) -> None:
    """Prints a line on standard output, and waits for it at most NOTICE_S: a stop must not hang on a reader."""
    thread = threading.Thread(target=_write_or_count, args=("stdout", text.encode() + b"\n"), name="notice", daemon=True)
    thread.start()
    thread.join(NOTICE_S)


def _write_or_count(stream: Stream, text: bytes) -> None:
    try:
        _write(stream, text)
    except (OSError, ValueError):  # its reader is gone
        _count_lost(stream, text)


def _write(stream: Stream, text: bytes) -> None:
    """Past Python's buffer, whose lock a blocked thread would hold when the interpreter ends. Raises OSError, ValueError."""
    file = getattr(sys, stream)
    try:
        descriptor = file.fileno()
    except (AttributeError, OSError, ValueError):  # not a file of the operating system
        file.write(text.decode())
        file.flush()
        return
    rest = memoryview(text)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # another process has made it non-blocking
            select.select([], [descriptor], [])


def _count_lost(stream: Stream, text: bytes) -> None:
    LOG_LINES_LOST.labels(stream).inc(text.count(b"\n"))
