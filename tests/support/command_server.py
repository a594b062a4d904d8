"""Runs `gptutor` commands in processes that are forked from one that has imported it: a start of Python and all imports takes a second
of CPU, a fork some milliseconds, and a test run has hundreds of commands."""

import atexit
import contextlib
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
START = "from tests.support.command_server import serve; serve()"


class CommandServer:
    """The process that forks. It runs one command at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def run(self, environ: dict[str, str], arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        """What `subprocess.run` gives for `gptutor <arguments>`, with both outputs as text."""
        with self._lock, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            own = f"/proc/{os.getpid()}/fd"
            outputs = [f"{own}/{stdout.fileno()}", f"{own}/{stderr.fileno()}"]
            code = self._run({"environ": environ, "arguments": arguments, "directory": str(Path.cwd()), "outputs": outputs})
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(["gptutor", *arguments], code, stdout.read().decode(), stderr.read().decode())

    def _run(self, command: dict[str, object]) -> int:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            atexit.register(self._stop, self._process)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        return int(line)

    @staticmethod
    def _stop(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=10)


def serve() -> None:
    """Forks a process for each line of the input, and prints its exit code. Ends with the input."""
    from gptutor.cli.main import main

    # One command first, which finds no database, so that all that a command imports late is imported before the forks.
    os.environ.update(DATABASE_URL="postgresql://postgres@127.0.0.1:9/none", GPTUTOR_SECRET_KEY="A" * 43 + "=")
    sys.argv = ["gptutor", "user", "list"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        main()
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
            main()  # its SystemExit ends the process, as if it had been started for this
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(command: dict[str, object]) -> None:
    """Gives this process the arguments, environment, folder and outputs of the command."""
    environ, arguments, directory, outputs = (command[name] for name in ("environ", "arguments", "directory", "outputs"))
    assert isinstance(environ, dict)
    assert isinstance(arguments, list)
    assert isinstance(outputs, list)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "r+b")) for path in (os.devnull, *outputs)]
        for number, file in enumerate(files):
            os.dup2(file.fileno(), number)
    os.chdir(str(directory))
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = ["gptutor", *arguments]
