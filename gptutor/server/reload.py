"""A reload (SIGHUP) looks first: the program that is on disk now checks the settings on disk now, in a process of its own.

Only if it finds nothing wrong do the processes that serve give way to new ones.
"""

import os
import signal
import struct
import sys
import tempfile
import time
from typing import IO

from gptutor.server.service_manager import one_line
from gptutor.telemetry.metrics import LAST_RELOAD_SUCCESS, LAST_RELOAD_TIMESTAMP

CHECK_S = 30.0
"""So long `gptutor check` may take."""
SENTENCES_BYTES_MAX = 2000


def own_command(*arguments: str) -> list[str]:
    """This program with other arguments, by the path by which it was started.

    The path is not resolved: it may lead through a symbolic link that names another release by now.
    """
    program = sys.argv[0]
    if not program.endswith(".py") and os.access(program, os.X_OK):
        return [program, *arguments]
    return [sys.executable, "-m", "gptutor", *arguments]


class SettingsCheck:
    """A run of `gptutor check`."""

    def __init__(self) -> None:
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `result`
        self._ends_at = time.monotonic() + CHECK_S
        self._is_late = False
        command = own_command("check")
        output = self._output.fileno()
        self.pid = os.posix_spawn(
            command[0],
            command,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)],
            setsigmask=[],  # the parent may have blocked signals
            setsigdef=[signal.SIGHUP],
        )

    def kill_if_late(self) -> None:
        if not self._is_late and time.monotonic() > self._ends_at:
            self._is_late = True
            os.kill(self.pid, signal.SIGKILL)

    def refusal(self, wait_status: int) -> str | None:
        """What is wrong, in sentences; None: nothing. To be called once, when the process has ended."""
        with self._output:
            self._output.seek(0)
            text = self._output.read(SENTENCES_BYTES_MAX).decode(errors="replace")
        if self._is_late:
            return f"gptutor check did not end within {CHECK_S:.0f} s."
        if (code := os.waitstatus_to_exitcode(wait_status)) == 0:
            return None
        return one_line(text.replace("gptutor: ", "")) or f"gptutor check ended with {code}."

    def wait(self) -> str | None:
        """Waits for the end, in a thread that has nothing else to do. See `refusal`."""
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.kill_if_late()
            time.sleep(0.02)
        return self.refusal(ended[1])


class LastReload:
    """Whether the last reload succeeded, and when it was tried.

    It is in memory that is shared with processes that are forked later, and, by `descriptor`, with a program that is executed in
    place of this one: the predecessor's processes go on showing what is true.

    The start counts as the first one.
    """

    _LAYOUT = struct.Struct("dd")

    def __init__(self, *, succeeded: bool = True, at: float | None = None, descriptor: int | None = None) -> None:
        """`descriptor` is that of the program that was executed in this process before: the memory stays as it is."""
        self.descriptor = _shared_memory() if descriptor is None else descriptor
        if descriptor is None:
            self._write(succeeded, time.time() if at is None else at)

    def record(self, *, succeeded: bool) -> None:
        self._write(succeeded, time.time())

    @property
    def values(self) -> tuple[bool, float]:
        succeeded, at = self._LAYOUT.unpack(os.pread(self.descriptor, self._LAYOUT.size, 0))
        return bool(succeeded), at

    def export(self) -> None:
        """Shows both as metrics of this process."""
        LAST_RELOAD_SUCCESS.set_function(lambda: float(self.values[0]))
        LAST_RELOAD_TIMESTAMP.set_function(lambda: self.values[1])

    def _write(self, succeeded: bool, at: float) -> None:
        os.pwrite(self.descriptor, self._LAYOUT.pack(succeeded, at), 0)


def _shared_memory() -> int:
    if sys.platform == "linux":
        return os.memfd_create("gptutor last reload")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
