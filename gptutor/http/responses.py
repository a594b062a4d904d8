"""JSON responses of the account's own endpoints: exact amounts, times in UTC, never cached."""

import datetime
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from gptutor.money.amounts import roubles


def json_response(document: Mapping[str, Any], *, status: int = 200) -> web.Response:
    response = web.Response(body=msgspec.json.encode(document), status=status, content_type="application/json")
    response.headers["Cache-Control"] = "no-store"
    return response


def roubles_as_number(nano: int) -> msgspec.Raw:
    """An exact JSON number, as the sign-in's documented shape has it; everywhere else amounts are strings."""
    return msgspec.Raw(roubles(nano).encode())


def timestamp(at: datetime.datetime) -> str:
    """The one format of the API: ISO 8601 in UTC with milliseconds, `2026-11-24T10:30:15.123Z`."""
    return at.astimezone(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
