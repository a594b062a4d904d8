"""Log files: one per day, retention, and one JSON line per record (contract F1)."""

import datetime
import json
import logging
import os
import time
from pathlib import Path

import pytest

from gptutor.telemetry import logs
from gptutor.telemetry.log_writer import DailyFile, logging_to


def test_each_day_has_its_file_and_expired_files_are_deleted(tmp_path: Path) -> None:
    for day in ("2020-01-01", "2099-01-30", "2099-01-31"):
        (tmp_path / f"combined-{day}.log").write_text("old")
    (tmp_path / "other.log").write_text("not ours")
    file = DailyFile(tmp_path, retention_days=2)
    file.write(datetime.date(2099, 2, 1), b"first\n")
    file.write(datetime.date(2099, 2, 2), b"second\n")
    file.close()
    assert (tmp_path / "combined-2099-02-01.log").read_text() == "first\n"
    assert (tmp_path / "combined-2099-02-02.log").read_text() == "second\n"
    assert {path.name for path in tmp_path.iterdir()} == {
        "combined-2099-01-31.log", "combined-2099-02-01.log", "combined-2099-02-02.log", "other.log",
    }  # fmt: skip


def test_every_record_is_one_json_line_and_is_written_before_logging_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to(tmp_path, level="info", retention_days=1, stdout=True) as log:
        log.http(method="GET", path="/", status=404, request_id="r\n1", duration_ms=2, code="not_found")
        try:
            raise ValueError("a\nb")
        except ValueError:
            logs.LOGGER.exception("It failed")
        logging.getLogger("someone.else").info("not for us")
        logs.LOGGER.debug("not at this level")
    (path,) = tmp_path.glob("combined-*.log")
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(first)[:3] == ["timestamp", "level", "message"]
    assert (first["message"], first["requestId"], first["code"]) == ("HTTP GET / 404", "r\n1", "not_found")
    assert second["level"] == "error"
    assert "ValueError: a\nb" in second["exc_info"]
    assert capsys.readouterr().out == path.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_created_by_root_stays_writable_for_the_service(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)
    DailyFile(tmp_path, retention_days=1).close()
    (path,) = tmp_path.iterdir()
    assert path.stat().st_uid == 12345


class BrokenPipe:
    """A stream whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    flush = isatty = write  # type: ignore[assignment]


def test_a_closed_standard_output_does_not_stop_the_log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with logging_to(tmp_path, level="info", retention_days=1, stdout=True) as log:
        monkeypatch.setattr("sys.stdout", BrokenPipe())
        monkeypatch.setattr("sys.stderr", BrokenPipe())
        for number in range(3):
            log.http(method="GET", path=f"/{number}", status=200, request_id="r", duration_ms=1, code=None)
            time.sleep(0.1)
    monkeypatch.undo()
    (path,) = tmp_path.glob("combined-*.log")
    assert len(path.read_text().splitlines()) == 3


def test_a_file_that_cannot_be_opened_is_tried_again(tmp_path: Path) -> None:
    file = DailyFile(tmp_path, retention_days=2)
    (tmp_path / "combined-2099-02-01.log").mkdir()
    with pytest.raises(OSError, match="directory"):
        file.write(datetime.date(2099, 2, 1), b"first\n")
    (tmp_path / "combined-2099-02-01.log").rmdir()
    file.write(datetime.date(2099, 2, 1), b"second\n")
    file.close()
    assert (tmp_path / "combined-2099-02-01.log").read_text() == "second\n"
