"""A short `make fuzz`: the code that parses external input raises only what it declares (contract A4, B2, C6, F8; rows input-1 to
input-6, -11, -13, -16, upstream-10, -15, auth-3)."""

import contextlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from gptutor.api.chat.request import parse_request
from gptutor.config.load import load
from gptutor.config.schema import ConfigError
from gptutor.errors import ApiError
from gptutor.money.keys import parse_key
from gptutor.openrouter.catalogue import CatalogueError, parse_models
from tests.fuzz import targets
from tests.fuzz.engines import HAS_ATHERIS, run_hypothesis
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parent.parent
RUNS = {"scanner": 300, "request": 500, "key": 500, "vk": 500, "config": 200, "models": 400}


def test_the_seeds_are_accepted_or_rejected_as_intended() -> None:
    assert all(parse_request(body, default_model="a/b").members for body in targets.BODIES)
    for body in targets.DUPLICATE_KEYS:
        with pytest.raises(ApiError):
            parse_request(body, default_model="a/b")
    assert [targets.scan_in_parts(stream, [], None)[0] is not None for stream in targets.STREAMS] == [
        True,
        True,
        True,
        True,
        False,
    ]
    assert all(parse_key(key.decode()) for key in targets.KEYS)
    assert [len(parse_models(document)) for document in targets.LISTS[:3]] == [1, 1, 1]


@pytest.mark.parametrize(
    "document", [b'{"data":[{"id":"a","\x80":1}]}', b'{"data":[{"id":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}"]
)
def test_an_unreadable_model_list_is_an_error_or_empty(document: bytes) -> None:
    with contextlib.suppress(CatalogueError):  # or its only model is left out
        assert parse_models(document) == []


@pytest.mark.parametrize("document", [b"\xff", b"[" * 3000])
def test_an_unreadable_settings_file_is_named_in_the_error(document: bytes, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_bytes(document)
    with pytest.raises(ConfigError, match=r"own\.yaml"):
        load({"GPTUTOR_CONFIG": str(file)})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "\udcff"),
        ("GPTUTOR_BILLING__MARGIN", "\udcff"),
        ("GPTUTOR_\udcff__X", "1"),
        ("OPENROUTER_BASE_URL", "https://[::1"),
    ],
)
def test_an_unreadable_setting_is_an_error(name: str, value: str) -> None:
    with pytest.raises(ConfigError):
        load({"OPENROUTER_API_KEY": "x", name: value})


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_accepted_or_raises_what_is_declared(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "gptutor")
    run_hypothesis(TARGETS[name], runs=RUNS[name], seed=1)


@pytest.mark.skipif(not HAS_ATHERIS, reason="atheris has no wheel for this machine")
def test_the_guided_fuzzer_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "key", "--seconds=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Done " in done.stderr
