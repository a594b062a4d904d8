"""Parsers of arguments and options: an invalid value gets a sentence, and only plain ASCII digits are a number."""

import datetime
import re
from collections.abc import Callable

import typer

SHOWN_MAX = 40
DAY_PATTERN = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
ID_MAX = 2**63 - 1


def whole_number(what: str, minimum: int, maximum: int) -> Callable[[str], int]:
    """A parser, whose sentence begins with `what`. (`int` would read `1_0` as ten, and digits of every script.)"""

    def parse(value: str) -> int:
        text = str(value)  # a default is a number already
        if not re.fullmatch(r"[0-9]{1,19}", text) or not minimum <= int(text) <= maximum:
            raise typer.BadParameter(f"{what} must be a whole number from {minimum} to {maximum}, not {text[:SHOWN_MAX]!r}.")
        return int(text)

    return parse


def row_id(what: str) -> Callable[[str], int]:
    """A parser of the id of a user or a key."""

    def parse(value: str) -> int:
        if not re.fullmatch(r"[1-9][0-9]{0,18}", value) or int(value) > ID_MAX:
            raise typer.BadParameter(f"{what} must be a number such as 17, not {value[:SHOWN_MAX]!r}.")
        return int(value)

    return parse


def day(value: str) -> datetime.date:
    """`2026-01-31`"""
    try:
        if DAY_PATTERN.fullmatch(value):
            return datetime.date.fromisoformat(value)
    except ValueError:
        pass
    raise typer.BadParameter(f"the day must be written as 2026-01-31, not {value[:SHOWN_MAX]!r}.")
