"""What stands in the address of a request."""

import datetime

from aiohttp import web

from gptutor.errors import Refusal
from gptutor.money.amounts import AccountId

ID_MAX = 10**18 - 1


def account(request: web.Request) -> AccountId:
    return AccountId(int(request.match_info["user_id"]))


def number(request: web.Request, name: str, default: int, *, least: int = 1, most: int = ID_MAX) -> int:
    """Raises Refusal."""
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and least <= int(text) <= most):
        raise Refusal("invalid_request", f"{name} must be a number from {least} to {most}")
    return int(text)


def day(request: web.Request, name: str) -> datetime.date | None:
    """Raises Refusal."""
    text = request.query.get(name)
    if text is None:
        return None
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise Refusal("invalid_request", f"{name} must be a day such as 2026-12-31") from error
