"""The oldest PostgreSQL that we promise: the money on Debian's PostgreSQL 15, beside the embedded 18 of all other tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import postgres

ROOT = Path(__file__).parent.parent
DEBIAN = Path("/usr/lib/postgresql/15/bin")
FILES = ("test_statements.py", "test_invariants.py", "test_ledger.py")


@pytest.mark.timeout(300)
@pytest.mark.skipif(
    not (DEBIAN / "postgres").exists(), reason=f"there is no PostgreSQL 15 in {DEBIAN}: apt install postgresql-15"
)
def test_statements_and_ledger_pass_on_postgresql_15() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(f"tests/{name}" for name in FILES)],
        cwd=ROOT,
        env={**clean, postgres.BINARIES: str(DEBIAN)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert f"PostgreSQL: {DEBIAN}" in ran.stdout
