"""`gptutor check`: whether the service could start, without a trace."""

import base64
from pathlib import Path

import pytest

from tests.support.gateway import SECRET
from tests.support.service import environment, refused, run

NO_SERVER = "postgresql://gptutor@127.0.0.1:1/gptutor"


def settings(directory: Path, database_url: str, **more: str) -> dict[str, str]:
    secret = base64.b64encode(SECRET).decode()
    return environment(directory, **{"DATABASE_URL": database_url, "GPTUTOR_SECRET_KEY": secret, **more})


def test_sound_settings_pass_and_nothing_is_made(tmp_path: Path, database_url: str) -> None:
    checked = run(settings(tmp_path, database_url), "check")
    assert "the service can start" in checked.stdout
    assert (checked.stderr, list(tmp_path.iterdir())) == ("", [])
    assert "the service can start" in run(environment(tmp_path), "check").stdout, (
        "the embedded database and its secret are made later"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_does_not_answer_is_a_warning(tmp_path: Path) -> None:
    checked = run(settings(tmp_path, NO_SERVER), "check")
    assert "the service would wait for it" in " ".join(checked.stderr.split())


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"GPTUTOR_RELAY__NO_SUCH": "1"}, "GPTUTOR_RELAY__NO_SUCH is not a setting"),
        ({"GPTUTOR_SECRET_KEY": ""}, "GPTUTOR_SECRET_KEY is missing"),
        ({"GPTUTOR_SECRET_KEY": "c2hvcnQ="}, "GPTUTOR_SECRET_KEY must be 32 bytes in base64"),
        ({"GPTUTOR_PATHS__LOGS": "/dev/null/logs"}, "paths.logs: /dev/null/logs does not exist, and cannot be made in /dev/null"),
        ({"GPTUTOR_PATHS__DATA": "/dev/null"}, "paths.data: /dev/null is not a folder"),
        (
            {"GPTUTOR_ADMIN__SOCKET": "/run/no-such-folder/admin.sock", "GPTUTOR_ADMIN__TOKEN": "t" * 32},
            "admin.socket: /run/no-such-folder does not exist",
        ),
    ],
)
def test_a_mistake_is_a_sentence_and_an_exit_code(tmp_path: Path, more: dict[str, str], sentence: str) -> None:
    assert sentence in refused(settings(tmp_path, NO_SERVER, **more), "check")


def test_a_rejected_login_and_missing_migrations_are_mistakes(tmp_path: Path, database_url: str) -> None:
    elsewhere = database_url.replace("/postgres?", "/no_such_database?")
    assert "PostgreSQL rejects DATABASE_URL" in refused(settings(tmp_path, elsewhere), "check")
    empty = database_url.replace("/postgres?", "/template1?")
    said = refused(settings(tmp_path, empty), "check")
    assert "The database lacks the migrations 0001_" in said
    assert "gptutor migrate" in said


def test_all_mistakes_are_said_at_once(tmp_path: Path, database_url: str) -> None:
    said = refused(settings(tmp_path, database_url, GPTUTOR_SECRET_KEY="", GPTUTOR_PATHS__DATA="/dev/null"), "check")
    assert "GPTUTOR_SECRET_KEY is missing" in said
    assert "paths.data" in said
