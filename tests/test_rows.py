"""The failure catalogue is the acceptance list: every row of these parts of it is named by a test."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROWS = {"input": 22, "upstream": 20, "client": 11, "auth": 14, "operator": 10, "sum": 10}
NAME = re.compile(r"(?:\b(?P<part>[a-z]+)-|(?P<range>to )-|(?<=[ (,])-)(?P<number>\d+)\b")


def named(text: str) -> Iterator[str]:
    """The rows that a docstring names: `money-7 to -11, upstream-1, -6`."""
    part, last = "", 0
    for found in NAME.finditer(text):
        number = int(found["number"])
        part = found["part"] or part
        for row in range(last + 1 if found["range"] else number, number + 1):
            yield f"{part}-{row}"
        last = number


def test_rows_are_read_as_people_write_them() -> None:
    assert list(named("rows money-7 to -9, upstream-1, -6; client-3")) == [
        "money-7", "money-8", "money-9", "upstream-1", "upstream-6", "client-3",
    ]  # fmt: skip


@pytest.mark.parametrize("part", ROWS)
def test_every_row_is_named(part: str) -> None:
    rows: set[str] = set()
    for path in Path(__file__).parent.glob("**/test_*.py"):
        module = ast.parse(path.read_text(encoding="utf-8"))
        for node in (module, *(node for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))):
            rows.update(named(" ".join((ast.get_docstring(node) or "").split())))
    assert {f"{part}-{number}" for number in range(1, ROWS[part] + 1)} - rows == set()
