"""Finds the log lines of one request: only these know of a request that was refused before anything was held for it.

Reads the daily files, compressed ones included, newest day first, in chunks, until all are read, enough lines are found, or the
time is over.
"""

import datetime
import gzip
import re
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from gptutor.text import escaped_json

CHUNK_BYTES = 256 * 1024
LINE_BYTES_MAX = 1024 * 1024
"""Longer lines are not searched."""
LINES_MAX = 200
IDS_MAX = 10
FIELDS = ("requestId", "generationId", "holdId")
LOG_FILE = re.compile(r"combined-(\d{4}-\d\d-\d\d).*\.log(\.gz)?")
UNREADABLE = (OSError, EOFError, zlib.error)
"""A file may be compressed or deleted at this moment, or be damaged; gzip.BadGzipFile is an OSError."""


@dataclass(frozen=True, slots=True)
class FoundLines:
    """Lines in the order of their time. `is_complete`: all files were read to the end."""

    lines: list[dict[str, Any]]
    is_complete: bool


def find_lines(
    directory: Path, ids: Sequence[str], *, within_s: float, days: Collection[datetime.date] | None = None
) -> FoundLines:
    """The lines that have one of the ids (at most IDS_MAX of them) as a request id, generation id or hold id.

    `days`: only in the files of these UTC days. Blocks for at most about `within_s` seconds.
    """
    ends = time.monotonic() + within_s
    needles = [
        b'"%s":%s' % (field.encode(), escaped_json(orjson.dumps(text)))
        for text in dict.fromkeys(ids[:IDS_MAX])
        for field in FIELDS
    ]
    lines: list[dict[str, Any]] = []
    is_complete = True
    for path in log_files(directory, days):
        try:
            for line in _lines_with(path, needles, ends):
                if len(lines) == LINES_MAX:
                    raise TimeoutError
                lines.append(line)
        except TimeoutError:
            is_complete = False
            break
        except UNREADABLE:
            is_complete = False
    return FoundLines(sorted(lines, key=lambda line: str(line.get("timestamp", ""))), is_complete)


def log_files(directory: Path, days: Collection[datetime.date] | None = None) -> list[Path]:
    """The log files, newest day first. A file that is just being compressed is listed once."""
    wanted = None if days is None else {day.isoformat() for day in days}
    names = {path.name: path for path in directory.glob("combined-*.log*")}
    found = [(match[1], name) for name in names if (match := LOG_FILE.fullmatch(name))]
    return [
        names[name]
        for day, name in sorted(found, reverse=True)
        if (wanted is None or day in wanted) and name.removesuffix(".gz") not in names.keys() - {name}
    ]


def _lines_with(path: Path, needles: Sequence[bytes], ends: float) -> Iterator[dict[str, Any]]:
    """Raises TimeoutError when `ends` has passed, and what UNREADABLE lists."""
    with opened(path) as file:
        rest = b""
        while chunk := file.read(CHUNK_BYTES):
            if time.monotonic() > ends:
                raise TimeoutError
            text, newline, rest = (rest + chunk).rpartition(b"\n")
            if newline:
                yield from _matching(text, needles)
            elif len(rest) > LINE_BYTES_MAX:
                rest = b""
        yield from _matching(rest, needles)


def opened(path: Path) -> BinaryIO:
    """A log file, compressed or not. Reading may raise what UNREADABLE lists."""
    return cast("BinaryIO", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _matching(text: bytes, needles: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """The lines of whole lines that contain a needle, in their order."""
    starts = set()
    for needle in needles:
        position = text.find(needle)
        while position >= 0:
            starts.add(text.rfind(b"\n", 0, position) + 1)
            end = text.find(b"\n", position)
            position = text.find(needle, end) if end >= 0 else -1
    for start in sorted(starts):
        end = text.find(b"\n", start)
        try:
            line = orjson.loads(text[start : end if end >= 0 else len(text)])
        except orjson.JSONDecodeError:
            continue  # a torn line
        if isinstance(line, dict):
            yield line
