"""The embedded PostgreSQL among other processes, users and folders (contract F9)."""

import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from gptutor.config.urls import is_database
from gptutor.database.embedded import EmbeddedPostgresError, embedded_postgres
from tests.support.service import environment, run


def test_a_pid_that_another_process_reuses_is_left_alone(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path / "postgres"):
        pass
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        stale = f"{bystander.pid}\n{tmp_path / 'postgres'}\n1700000000\n5432\n{tmp_path / 'postgres'}\n\n  1 1\nready\n"
        (tmp_path / "postgres" / "postmaster.pid").write_text(stale)
        with embedded_postgres(tmp_path / "postgres") as url:
            assert url.startswith("postgresql://")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


async def test_a_path_may_have_characters_that_are_special_in_a_url(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path / "a@b+[c]" / "postgres") as url:
        assert is_database(url)
        server = await asyncpg.connect(url)
        assert await server.fetchval("SELECT 1") == 1
        await server.close()


def test_a_path_with_a_space_is_rejected_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedPostgresError, match="has a space"), embedded_postgres(tmp_path / "my data" / "postgres"):
        pass
    ended = run(environment(tmp_path / "my data"), "user", "create", check=False)
    assert ended.returncode == 1
    assert "GPTUTOR_PATHS__DATA" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's server is another user's")
def test_parent_folders_become_traversable_and_not_readable(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with embedded_postgres(closed / "var" / "postgres"):
        pass
    assert stat.S_IMODE(closed.stat().st_mode) == 0o710  # the server has root's group
    os.chown(closed, 0, 65534)
    with embedded_postgres(closed / "var" / "postgres"):
        pass
    assert stat.S_IMODE(closed.stat().st_mode) == 0o711


def long_path(tmp_path: Path) -> Path:
    """A data folder whose path is too long for a Unix socket."""
    return tmp_path / ("long" * 25) / "var" / "postgres"


async def test_the_socket_of_a_long_path_works(tmp_path: Path) -> None:
    with embedded_postgres(long_path(tmp_path)) as url:
        server = await asyncpg.connect(url)
        assert await server.fetchval("SELECT 1") == 1
        await server.close()


def test_the_socket_of_a_long_path_is_in_a_private_folder(tmp_path: Path) -> None:
    with embedded_postgres(long_path(tmp_path)) as url:
        (folder,) = parse_qs(urlsplit(url).query)["host"]
        assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700
        socket_exists = ["test", "-S", f"{folder}/.s.PGSQL.5432"]
        assert subprocess.run(socket_exists, check=False).returncode == 0
        if os.geteuid() == 0:
            seen = subprocess.run(socket_exists, user=65534, group=65534, extra_groups=[], cwd="/", check=False)
            assert seen.returncode == 1


def test_a_folder_that_somebody_else_prepared_for_the_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Path(tempfile.mkdtemp(prefix="gptutor-"))
    short.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    try:
        with embedded_postgres(long_path(tmp_path)):
            (folder,) = short.iterdir()
        folder.chmod(0o777)
        with pytest.raises(EmbeddedPostgresError, match="not a private folder"), embedded_postgres(long_path(tmp_path)):
            pass
        folder.rmdir()
        folder.symlink_to("/tmp")
        with pytest.raises(EmbeddedPostgresError, match="not a private folder"), embedded_postgres(long_path(tmp_path)):
            pass
        monkeypatch.setattr(tempfile, "tempdir", str(long_path(tmp_path)))
        with pytest.raises(EmbeddedPostgresError, match="path is too long"), embedded_postgres(long_path(tmp_path)):
            pass
    finally:
        shutil.rmtree(short)


def test_a_running_server_whose_socket_is_open_to_others_is_not_used(tmp_path: Path) -> None:
    with embedded_postgres(long_path(tmp_path)) as url:
        (folder,) = parse_qs(urlsplit(url).query)["host"]
        Path(folder).chmod(0o777)
        with pytest.raises(EmbeddedPostgresError, match="other users of this machine"), embedded_postgres(long_path(tmp_path)):
            pass
        Path(folder).chmod(0o700)
