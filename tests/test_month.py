"""A short `make month`: what an operator lives through in a month."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.postgres import CLUSTER

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(240)
def test_an_operators_month_passes_without_a_lost_request_or_rouble_and_with_each_alert_told_once() -> None:
    # Not in pytest's folder: every start of pytest closes it to other users, and PostgreSQL may run as one.
    with tempfile.TemporaryDirectory(prefix="gptutor-month-", ignore_cleanup_errors=True) as directory:
        cluster = Path(directory) / "postgres"
        CLUSTER.copy(cluster)
        command = [sys.executable, "-m", "tests.month", "--seconds=1", "--per-second=15", "--replacements=1", "--reuse"]
        process = subprocess.Popen(
            [*command, f"--cluster={cluster}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        with process:
            try:
                report, _ = process.communicate(timeout=220)
            finally:
                process.send_signal(signal.SIGTERM)  # if it is still running; it stops the processes that it started
        print(report)
        assert process.returncode == 0, report
