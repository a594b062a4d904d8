"""One page of metrics for all processes of the service, whichever of them answers the scrape.

Each process has a socket in one folder, `<data>/metrics/<name>.sock`, and a thread that answers a connection with the process's
snapshot: also while its event loop is blocked. The scraped process asks all others, and adds up.

A counter must not go down: Prometheus would take the rest for an increase. So the file `totals.json` has the sum of all processes
that have ended, and the latest snapshot of each living one. A process that stops adds its own numbers to the sum. One that was
killed, whose socket refuses connections, is added as it was last seen; so is, for the time being, one that does not answer. What
a killed process counted after its last scrape is lost.

A lock on the folder, held while a scrape or a stop takes place, makes each process count either as living or as ended.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gptutor.telemetry.metrics import PROCESS_DEATHS, PROCESS_STARTS, PROCESSES
from gptutor.telemetry.snapshots import Snapshot, decode, dump, encode, load, merge, take_snapshot, to_text, without_gauges

LOGGER = logging.getLogger("gptutor.metrics")
FOLDER = "metrics"
"""In `paths.data`."""
TOTALS = "totals.json"
SUFFIX = ".sock"
LOCK_S = 2.0
"""The longest wait for another scrape, or another process's stop."""
ANSWERS_S = 1.0
"""How long all other processes together have to answer."""
ANSWER_MIN_S = 0.05
BACKLOG = 16
ANSWER_BYTES_MAX = 64 << 20
NO_ROOM_PAUSE_S = 0.1
REFUSED = (ConnectionRefusedError, FileNotFoundError)


class MetricsBusy(Exception):
    """Another process has the folder locked for too long; the text is for the client."""


def own_text() -> bytes:
    """The metrics of this process alone."""
    return to_text(take_snapshot())


MetricsText = Callable[[], bytes]
"""Returns the page. It may take a second, and may block: it is called in a thread. Raises MetricsBusy."""


@contextmanager
def shared_metrics(folder: Path) -> Iterator[MetricsText]:
    """While this context lasts, the process is one of those that share the folder. Without a usable folder it is alone."""
    PROCESS_STARTS.inc()
    try:
        member = Member(folder)
    except OSError as error:
        LOGGER.error("The metrics of other processes are not included: %s: %s", folder, error.strerror or error)
        yield own_text
        return
    try:
        yield member.text
    finally:
        member.leave()


class Member:
    """One process. Raises OSError if the folder or the socket cannot be made."""

    def __init__(self, folder: Path, take: Callable[[], Snapshot] = take_snapshot) -> None:
        self._take = take
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._path = folder
        self._name = uuid.uuid4().hex
        self._is_leaving = False
        try:
            try:
                with self._locked():  # nobody sees a socket that does not listen yet
                    self._listener = self._listening()
            except MetricsBusy:
                self._listener = self._listening()
        except OSError:
            os.close(self._folder)
            raise
        self._thread = threading.Thread(target=self._answer, name="metrics", daemon=True)
        self._thread.start()

    def text(self) -> bytes:
        """The page for all processes. Raises MetricsBusy."""
        with self._locked():
            ended, seen = self._read_totals()
            others: dict[str, Snapshot] = {}
            silent = 0
            until = time.monotonic() + ANSWERS_S
            for name in self._names() - {self._name}:
                try:
                    others[name] = self._ask(name, until)
                except REFUSED:
                    PROCESS_DEATHS.inc()
                    self._unlink(name)
                except (OSError, ValueError):
                    silent += 1
                    others[name] = seen.get(name, {})
            for name in seen.keys() - others.keys() - {self._name}:
                ended = _added(ended, seen[name])
            PROCESSES.set(len(others) + 1 - silent, ("answering",))
            PROCESSES.set(silent, ("silent",))
            own = self._take()
            PROCESSES.clear()  # what the next scrape finds is another's to say
            self._write_totals(ended, {**others, self._name: own})
        return to_text(merge(own, [ended, *others.values()]))

    def leave(self) -> None:
        """At the stop: the process's numbers are added to those of the ended ones."""
        try:
            with self._locked():
                ended, seen = self._read_totals()
                seen.pop(self._name, None)
                self._write_totals(_added(ended, self._take()), seen)
                self._unlink(self._name)
        except MetricsBusy as error:
            LOGGER.warning("This process is counted as it was last scraped: %s", error)
            self._unlink(self._name)
        self._is_leaving = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(ANSWERS_S)
        self._listener.close()
        os.close(self._folder)

    # -- the thread

    def _answer(self) -> None:
        while not self._is_leaving:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    time.sleep(NO_ROOM_PAUSE_S)
                    continue
                return
            with connection:
                connection.settimeout(ANSWERS_S)
                try:
                    connection.sendall(encode(dump(self._take())))
                except OSError:
                    pass  # the client has disconnected
                except Exception:
                    LOGGER.exception("The metrics of this process cannot be read")

    # -- the folder

    def _address(self, name: str) -> str:
        """By the folder's descriptor: the path may be longer than the address of a socket can be."""
        own = Path("/proc/self/fd") / str(self._folder)
        return str((own if own.exists() else self._path) / f"{name}{SUFFIX}")

    def _listening(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(self._address(self._name))
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        return listener

    def _names(self) -> set[str]:
        return {name.removesuffix(SUFFIX) for name in os.listdir(self._folder) if name.endswith(SUFFIX)}

    def _ask(self, name: str, until: float) -> Snapshot:
        """Raises OSError, and ValueError for an answer that is none."""
        answer = bytearray()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(max(until - time.monotonic(), ANSWER_MIN_S))
            connection.connect(self._address(name))
            while len(answer) <= ANSWER_BYTES_MAX and (part := connection.recv(1 << 18)):
                answer += part
                connection.settimeout(max(until - time.monotonic(), ANSWER_MIN_S))
        return load(decode(bytes(answer)))

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(f"{name}{SUFFIX}", dir_fd=self._folder)

    def _read_totals(self) -> tuple[Snapshot, dict[str, Snapshot]]:
        """The sum of the ended processes, and the latest snapshot of each living one."""
        try:
            with open(TOTALS, "rb", opener=self._opener) as file:
                document = decode(file.read())
            return load(document["ended"]), {name: load(snapshot) for name, snapshot in document["seen"].items()}
        except FileNotFoundError:
            return {}, {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            LOGGER.warning("The metrics of ended processes are lost: %s: %s", self._path / TOTALS, error)
            return {}, {}

    def _write_totals(self, ended: Snapshot, seen: dict[str, Snapshot]) -> None:
        """In one step. On a full disk the file stays as it is: then a process that ends now is counted as it was seen before."""
        document = {
            "ended": dump(ended),
            "seen": {name: dump(without_gauges(snapshot)) for name, snapshot in seen.items()},
        }
        try:
            with open(f"{TOTALS}.new", "wb", opener=self._opener) as file:
                file.write(encode(document))
            os.rename(f"{TOTALS}.new", TOTALS, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        except OSError as error:
            LOGGER.warning("The metrics of ended processes cannot be written: %s: %s", self._path / TOTALS, error.strerror)

    def _opener(self, path: str, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, stat.S_IRUSR | stat.S_IWUSR, dir_fd=self._folder)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Raises MetricsBusy."""
        # Opened for each use, so that threads of one process exclude each other, too.
        lock = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._folder)
        try:
            until = time.monotonic() + LOCK_S
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise MetricsBusy("Another scrape takes too long; try again.") from None
                    time.sleep(0.01)
            yield
        finally:
            os.close(lock)


def _added(ended: Snapshot, snapshot: Snapshot) -> Snapshot:
    """The ended ones with one more."""
    rest = without_gauges(snapshot)
    return {**ended, **merge(rest, [{name: family for name, family in ended.items() if name in rest}])}
