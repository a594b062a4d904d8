"""A short `make chaos` (rows db-1 to db-7, process-1 to process-8, client-1 to client-3, upstream-9 to upstream-14)."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(240)
def test_no_kill_crash_or_lost_reply_loses_duplicates_or_invents_a_charge() -> None:
    command = [
        sys.executable,
        "-m",
        "tests.chaos",
        "--seconds=40",
        "--skip-slow-holds",
        "--kills-at-least=30",
        "--crashes-at-least=2",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            report, _ = process.communicate(timeout=220)
        finally:
            process.send_signal(signal.SIGTERM)  # if it is still running; it stops the processes that it started
    print(report)
    assert process.returncode == 0, report
