"""A short `make month` (issue "Years on a VPS": what it must show)."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.postgres import CLUSTER

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(240)
def test_an_operators_month_passes_without_a_lost_request_or_rouble_and_with_each_alert_told_once(tmp_path: Path) -> None:
    CLUSTER.copy(tmp_path / "postgres")
    command = [sys.executable, "-m", "tests.month", "--seconds=1", "--per-second=15", "--replacements=1", "--reuse"]
    process = subprocess.Popen(
        [*command, f"--cluster={tmp_path / 'postgres'}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with process:
        try:
            report, _ = process.communicate(timeout=220)
        finally:
            process.send_signal(signal.SIGTERM)  # if it is still running; it stops the processes that it started
    print(report)
    assert process.returncode == 0, report
