"""Runs `python -m gptutor …` in processes that are forked from one that has imported it: a start of Python with all imports takes a
second of CPU, a fork some milliseconds, and a test run has hundreds of commands and services."""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import io
import json
import os
import pkgutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gptutor

ROOT = Path(__file__).parent.parent.parent
START = "from tests.support.forked import serve; serve(int(__import__('sys').argv[1]))"
LENGTH_BYTES = 4
PR_SET_CHILD_SUBREAPER = 36
"""From Linux's prctl.h."""


class Forker:
    """The process that forks. Each fork becomes a child of the process that asks for it, which can wait for its exit code."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def fork(self, command: dict[str, Any], descriptors: list[int]) -> int:
        """Starts the command with these standard descriptors. Returns the id of its process."""
        with self._lock:
            if self._socket is None or self._process is None or self._process.poll() is not None:
                self._socket, self._process = self._start()
            message = json.dumps(command).encode()
            # An orphan becomes a child of its nearest ancestor that wants orphans; only of this process, and only for the moment.
            _adopt_orphans(True)
            try:
                socket.send_fds(self._socket, [len(message).to_bytes(LENGTH_BYTES, "big")], descriptors)
                self._socket.sendall(message)
                return int.from_bytes(_receive(self._socket, LENGTH_BYTES), "big")
            finally:
                _adopt_orphans(False)

    def _start(self) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            process = subprocess.Popen([sys.executable, "-c", START, str(number), "gptutor"], cwd=ROOT, pass_fds=[number])
        atexit.register(self._stop, ours, process)
        return ours, process

    @staticmethod
    def _stop(connection: socket.socket, process: subprocess.Popen[bytes]) -> None:
        connection.close()
        process.wait(timeout=10)


FORKER = Forker()


class Forked(subprocess.Popen[str]):
    """`python -m gptutor <arguments>`, as `subprocess.Popen` starts it, but by a fork."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        # The parameters of CPython's own method, from 3.11 to 3.14; all between those named here are not used.
        cwd, environ, pipes = rest[4], rest[5], rest[9:15]
        umask = os.umask(0)
        os.umask(umask)
        command = {"arguments": args, "directory": str(cwd or Path.cwd()), "environ": environ, "umask": umask}
        standard = [own if number < 0 else number for own, number in enumerate((pipes[0], pipes[3], pipes[5]))]
        self.pid = FORKER.fork(command, standard)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def run_forked(environ: dict[str, str], arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` gives for `gptutor <arguments>`, with both outputs as text."""
    pipe = subprocess.PIPE
    with Forked(arguments, env=environ, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as process:
        stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(["gptutor", *arguments], process.returncode, stdout, stderr)


def _adopt_orphans(wanted: bool) -> None:
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0):
        raise OSError("prctl")


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        assert part, "the process that forks has ended"
        received += part
    return received


# -- in the process that forks


def serve(number: int) -> None:
    """Forks a process for each message, and answers with its id. Ends when the other end of the socket is closed."""
    from gptutor.cli.main import main

    for module in pkgutil.walk_packages(gptutor.__path__, "gptutor."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    # One command first, which finds no database, so that what a command imports late is imported before the forks.
    os.environ.update(DATABASE_URL="postgresql://postgres@127.0.0.1:9/none", GPTUTOR_SECRET_KEY="A" * 43 + "=")
    sys.argv = ["gptutor", "user", "list"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        main()
    gc.freeze()
    connection = socket.socket(fileno=number)
    while True:
        length, descriptors, _, _ = socket.recv_fds(connection, LENGTH_BYTES, 3)
        if not length:
            return
        command = json.loads(_receive(connection, int.from_bytes(length, "big")))
        told, tell = os.pipe()
        middle = os.fork()
        if middle == 0:
            child = os.fork()
            if child:  # the process between the two ends, and leaves an orphan
                os.write(tell, child.to_bytes(LENGTH_BYTES, "big"))
                os._exit(0)
            os.close(told)
            os.close(tell)
            connection.close()
            _become(command, descriptors)
            main()  # its SystemExit ends the process, as if it had been started for this
            return
        os.waitpid(middle, 0)
        connection.sendall(os.read(told, LENGTH_BYTES))
        for descriptor in (*descriptors, told, tell):
            os.close(descriptor)


def _become(command: dict[str, Any], descriptors: list[int]) -> None:
    """Gives this process the arguments, the environment, the folder and the standard descriptors of the command."""
    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(command["directory"])
    os.umask(command["umask"])
    os.environ.clear()
    os.environ.update(command["environ"] or {})
    time.tzset()
    if "PYTHONFAULTHANDLER" in os.environ:
        faulthandler.enable()
    sys.argv = [str(Path(gptutor.__file__).with_name("__main__.py")), *command["arguments"]]
