"""The embedded PostgreSQL among other processes, users and folders (contract F9)."""

import os
import stat
import subprocess
from pathlib import Path

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
    assert stat.S_IMODE(closed.stat().st_mode) == 0o711
