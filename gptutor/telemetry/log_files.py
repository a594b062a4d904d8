"""The files of the log: `combined-YYYY-MM-DD.log` of the current day (UTC), to which several processes append.

A file that has become too large, or whose day is over, is renamed to `combined-YYYY-MM-DD.001.log` and compressed to
`combined-YYYY-MM-DD.001.log.gz`. Files are deleted by age, and the oldest ones when all together are too large.

No line is lost by this. Who writes has a shared lock on the file, and looks whether the file still has its name; who compresses
has an exclusive lock. So after a file was renamed and locked, nothing is appended to it any more. Locks end with their process.
Whatever a killed process leaves half-done is done again: a compressed file gets its name when it is complete, and only then the
original is deleted.
"""

import contextlib
import datetime
import fcntl
import gzip
import logging
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FILE_MODE = 0o640
NAME = re.compile(r"combined-(\d{4}-\d\d-\d\d)(?:\.log|\.(\d{3,8})\.log(\.gz|\.gz\.part)?)")
"""The day, and of a renamed file its number and how it is compressed."""
TIDY_INTERVAL_S = 600.0
BUSY_S = 1.0
"""So long later, what another process had locked is looked at again."""
CHUNK_BYTES = 128 * 1024
PAUSE_S = 0.02
"""After each chunk that is compressed, so that compression takes a fraction of one core."""
CLOSE_S = 2.0

CURRENT = float("inf")
"""The number of a file that has none."""

LOGGER = logging.getLogger("gptutor.log_files")


@dataclass(frozen=True, slots=True, order=True)
class _File:
    """In the order of time: by day, then those that were renamed, then the one that was not."""

    day: str
    number: float
    path: Path
    is_compressed: bool


class LogFolder:
    """`bytes_max`: all files together; `file_bytes_max`: one, before it is compressed."""

    def __init__(self, directory: Path, retention_days: int, bytes_max: int, file_bytes_max: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.file_bytes_max = file_bytes_max
        self._retention = datetime.timedelta(days=retention_days)
        self._bytes_max = bytes_max

    def current(self, day: datetime.date) -> Path:
        return self.directory / f"combined-{day:%Y-%m-%d}.log"

    def open(self, path: Path, flags: int) -> int:
        """Opens a file for writing, and creates it for the folder's owner. Raises OSError."""
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, FILE_MODE)
        owner = self.directory.stat()
        if os.geteuid() == 0 != owner.st_uid:
            os.fchown(file, owner.st_uid, owner.st_gid)  # the service must be able to append to a file created by root
        return file

    def rotate(self, path: Path) -> None:
        """Renames a current file if it is still too large: another process may have done it. Raises OSError."""
        with self._renaming() as may_rename, contextlib.suppress(FileNotFoundError):
            if may_rename and path.stat().st_size >= self.file_bytes_max:
                self._rename(path)

    def rotate_past_days(self, today: datetime.date) -> None:
        """Raises OSError."""
        with self._renaming() as may_rename:
            if may_rename:
                for file in self._files():
                    if file.number == CURRENT and file.day < f"{today:%Y-%m-%d}" and stat.S_ISREG(file.path.lstat().st_mode):
                        self._rename(file.path)

    def compress(self, stopping: threading.Event) -> bool:
        """Compresses what has been renamed. Returns whether nothing is left to do, here or by another process. Raises OSError."""
        is_done = True
        for file in self._files():
            if file.number != CURRENT and not file.is_compressed and not stopping.is_set():
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    is_done &= self._compress(file.path, stopping)
        return is_done

    def delete_expired(self, today: datetime.date) -> None:
        """Deletes by age, and the oldest ones, so that the rest fits. Raises OSError, after all that can be deleted."""
        oldest = f"{today - self._retention:%Y-%m-%d}"
        room = self._bytes_max - self.file_bytes_max  # the rest is for the current file
        failure: OSError | None = None
        for file in reversed(self._files()):
            if file.path == self.current(today):
                continue
            try:
                room -= file.path.lstat().st_size
                if file.day < oldest or room < 0:
                    file.path.unlink()
            except FileNotFoundError:  # another process was faster
                pass
            except OSError as error:
                failure = error
        if failure is not None:
            raise failure

    def _files(self) -> list[_File]:
        found = [(path, NAME.fullmatch(path.name)) for path in self.directory.iterdir()]
        return sorted(_File(match[1], float(match[2] or CURRENT), path, match[3] is not None) for path, match in found if match)

    @contextmanager
    def _renaming(self) -> Iterator[bool]:
        """Whether this process alone may rename files now."""
        folder = os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield try_lock(folder, fcntl.LOCK_EX)
        finally:
            os.close(folder)

    def _rename(self, path: Path) -> None:
        day = path.name.removeprefix("combined-").removesuffix(".log")
        last = max((int(file.number) for file in self._files() if file.day == day and file.number != CURRENT), default=0)
        path.rename(self.directory / f"combined-{day}.{last + 1:03}.log")

    def _compress(self, path: Path, stopping: threading.Event) -> bool:
        """Returns False if a process writes to the file or compresses it. Raises OSError."""
        target = path.with_name(f"{path.name}.gz")
        partial = path.with_name(f"{path.name}.gz.part")
        with path.open("rb") as source:
            if not try_lock(source.fileno(), fcntl.LOCK_EX):
                return False
            with open(self.open(partial, os.O_TRUNC), "wb") as file:
                with gzip.GzipFile(path.name, "wb", 6, file) as compressed:
                    while chunk := source.read(CHUNK_BYTES):
                        compressed.write(chunk)
                        if stopping.wait(PAUSE_S):
                            return False
                file.flush()
                os.fsync(file.fileno())
            partial.rename(target)
            path.unlink()
        return True


def try_lock(file: int, kind: int) -> bool:
    """Locks an open file, until it is closed; False if another process has a lock that excludes this one."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class DailyFile:
    """The current file of the folder."""

    def __init__(self, folder: LogFolder) -> None:
        self._folder = folder
        self._day = datetime.datetime.now(datetime.UTC).date()
        self._is_torn = False
        """Whether the file ends in a part of a line."""
        self._open()
        self._finish_files(is_too_large=False)

    def write(self, day: datetime.date, lines: bytes) -> bool:
        """Appends lines that were logged on `day`. Opens a new file when the day changes, or when the file was renamed.

        Returns whether a file has been finished. Raises OSError.
        """
        has_finished = day > self._day
        if has_finished:
            previous_day = self._day
            self._day = day
            try:
                self._reopen()
            except OSError:
                self._day = previous_day  # the next call tries to open the new file again
                raise
        while not self._lock_current():
            self._reopen()
        try:
            rest = memoryview(b"\n" + lines if self._is_torn else lines)
            while rest:
                written = os.write(self._file, rest)
                self._is_torn = written < len(rest)  # until the rest follows; on a full disk it does not
                rest = rest[written:]
            is_too_large = os.fstat(self._file).st_size >= self._folder.file_bytes_max
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        if has_finished or is_too_large:
            self._finish_files(is_too_large=is_too_large)
        return has_finished or is_too_large

    def close(self) -> None:
        os.close(self._file)

    def _finish_files(self, *, is_too_large: bool) -> None:
        """What fails here is tried again by the next call, and reported by the housekeeper: no line is lost."""
        with contextlib.suppress(OSError):
            if is_too_large:
                self._folder.rotate(self._folder.current(self._day))
            self._folder.delete_expired(self._day)

    def _lock_current(self) -> bool:
        """Locks the file for writing; False if it is not the current one any more. Raises OSError."""
        if not try_lock(self._file, fcntl.LOCK_SH):
            return False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file), self._folder.current(self._day).stat()):
                return True
        return False

    def _open(self) -> None:
        self._file = self._folder.open(self._folder.current(self._day), os.O_APPEND)
        self._is_torn = False

    def _reopen(self) -> None:
        previous = self._file
        self._open()
        os.close(previous)


class Housekeeper:
    """A thread that compresses and deletes files: now and then, and when `file_finished` is called."""

    def __init__(self, folder: LogFolder) -> None:
        self._folder = folder
        self._has_work = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log files", daemon=True)
        self._thread.start()

    def file_finished(self) -> None:
        self._has_work.set()

    def close(self) -> None:
        """What is being compressed is given up, and done at the next start."""
        self._stopping.set()
        self._has_work.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._has_work.clear()
            try:
                is_done = self._tidy()
            except OSError as error:
                is_done = True
                LOGGER.error("Log files cannot be compressed or deleted: %s", error)
            self._has_work.wait(TIDY_INTERVAL_S if is_done else BUSY_S)

    def _tidy(self) -> bool:
        today = datetime.datetime.now(datetime.UTC).date()
        self._folder.delete_expired(today)  # first: it makes room
        self._folder.rotate_past_days(today)
        self._folder.rotate(self._folder.current(today))
        is_done = self._folder.compress(self._stopping)
        self._folder.delete_expired(today)
        return is_done
