"""How the account's own endpoints answer: JSON, exact amounts, times in UTC, and nothing of it kept by anybody on the way."""

import datetime
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from gptutor.money.amounts import roubles


def answer(document: Mapping[str, Any], *, status: int = 200) -> web.Response:
    response = web.Response(body=msgspec.json.encode(document), status=status, content_type="application/json")
    response.headers["Cache-Control"] = "no-store"
    return response


def amount(nano: int) -> msgspec.Raw:
    """Roubles as a JSON number that is spelled exactly: no float has touched it."""
    return msgspec.Raw(roubles(nano).encode())


def moment(at: datetime.datetime) -> str:
    """ISO 8601 in UTC: `2026-11-24T10:30:15.123Z`."""
    return at.astimezone(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
