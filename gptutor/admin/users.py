"""`/admin/users…`: users and their keys."""

from typing import Annotated, Literal

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from gptutor.admin.auth import administration_of
from gptutor.admin.responses import data_response
from gptutor.http.app_keys import CONFIG
from gptutor.http.body import read_json_body
from gptutor.http.json_body import Amount, PrintableText, whole
from gptutor.http.query import Query
from gptutor.money.amounts import AccountId, InvalidAmount, Nano, nano_of
from gptutor.money.key_limits import NAME_MAX, REQUESTS_PER_MINUTE_MAX, KeyLimitChanges, changed_limits, parse_expiry
from gptutor.money.keyring import NO_LIMITS
from gptutor.money.records import key_json, user_details_json, user_json

PAGE = 100
PAGE_MAX = 1000
ID_MAX = 10**18 - 1
AN_AMOUNT = "an amount in roubles, such as 99.50"

Name = Annotated[PrintableText, msgspec.Meta(max_length=NAME_MAX)]


class NewUser(msgspec.Struct, forbid_unknown_fields=True):
    name: Name = ""
    balance: Annotated[Amount, msgspec.Meta(description=AN_AMOUNT)] = Amount(0)


class KeyLimitsBody(msgspec.Struct, forbid_unknown_fields=True):
    """The limits of a key: an absent one stays as it is, null lifts it."""

    limit: Annotated[Amount | UnsetType | None, msgspec.Meta(description=f"{AN_AMOUNT}, or null")] = UNSET
    limit_reset: Annotated[Literal["daily"] | UnsetType | None, msgspec.Meta(description='"daily", or null for never')] = UNSET
    requests_per_minute: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=REQUESTS_PER_MINUTE_MAX)]
        | Annotated[float, msgspec.Meta(ge=1, le=REQUESTS_PER_MINUTE_MAX, multiple_of=1)]
        | UnsetType
        | None,
        msgspec.Meta(description=f"a whole number from 1 to {REQUESTS_PER_MINUTE_MAX}, or null"),
    ] = UNSET
    expires_at: Annotated[
        str | UnsetType | None,
        msgspec.Meta(description="a day such as 2026-12-31, a time such as 2026-12-31T18:00:00Z, or null"),
    ] = UNSET

    def changes(self) -> KeyLimitChanges:
        """Raises InvalidAmount, InvalidLimit."""
        changes = KeyLimitChanges()
        if self.limit is not UNSET:
            changes["limit"] = None if self.limit is None else not_negative(self.limit)
        if self.limit_reset is not UNSET:
            changes["limit_reset"] = self.limit_reset
        if self.requests_per_minute is not UNSET:
            changes["requests_per_minute"] = whole(self.requests_per_minute)
        if self.expires_at is not UNSET:
            changes["expires_at"] = None if self.expires_at is None else parse_expiry(self.expires_at)
        return changes


class NewKey(KeyLimitsBody, forbid_unknown_fields=True):
    name: Name = ""


async def list_users(request: web.Request) -> web.Response:
    """`?query=` finds users by id, VK id, or the beginning of a key; without it all users come in pages, by id."""
    query = Query(request, ("query", "cursor", "limit"))
    users = administration_of(request).users
    if text := (query.text("query") or "").strip():
        return data_response([user_json(user) for user in await users.search(text)], next_cursor=None)
    limit = query.integer("limit", minimum=1, maximum=PAGE_MAX, default=PAGE)
    found = await users.page(query.integer("cursor", minimum=0, maximum=ID_MAX, default=0), limit + 1)
    page = found[:limit]
    next_cursor = str(page[-1].account_id) if len(found) > limit else None
    return data_response([user_json(user) for user in page], next_cursor=next_cursor)


async def show_user(request: web.Request) -> web.Response:
    Query(request, ())
    return data_response(user_details_json(await administration_of(request).user_details(account_id_of(request))))


async def create_user(request: web.Request) -> web.Response:
    body = await read_json_body(request, NewUser)
    user, key = await administration_of(request).create_user(body.name, not_negative(body.balance))
    return data_response(user_json(user) | {"apiKey": key}, 201)


async def activate_user(request: web.Request) -> web.Response:
    return data_response(user_json(await administration_of(request).set_active(account_id_of(request), True)))


async def deactivate_user(request: web.Request) -> web.Response:
    return data_response(user_json(await administration_of(request).set_active(account_id_of(request), False)))


async def list_keys(request: web.Request) -> web.Response:
    Query(request, ())
    details = await administration_of(request).user_details(account_id_of(request))
    return data_response([key_json(key) for key in details.keys])


async def issue_key(request: web.Request) -> web.Response:
    body = await read_json_body(request, NewKey)
    limits = changed_limits(NO_LIMITS, body.changes(), _limit_min(request))
    secret, key = await administration_of(request).issue_key(account_id_of(request), body.name, limits)
    return data_response(key_json(key) | {"apiKey": secret}, 201)


async def limit_key(request: web.Request) -> web.Response:
    body = await read_json_body(request, KeyLimitsBody)
    key_id = int(request.match_info["key_id"])
    key = await administration_of(request).limit_key(account_id_of(request), key_id, body.changes(), _limit_min(request))
    return data_response(key_json(key))


async def revoke_key(request: web.Request) -> web.Response:
    key_id = int(request.match_info["key_id"])
    return data_response(key_json(await administration_of(request).revoke_key(account_id_of(request), key_id)))


def account_id_of(request: web.Request) -> AccountId:
    """The user in the request's path."""
    return AccountId(int(request.match_info["user_id"]))


def _limit_min(request: web.Request) -> Nano:
    """The least that a key's limit may be."""
    return nano_of(request.app[CONFIG].billing.balance_min_rub)


def not_negative(amount: Amount) -> Nano:
    """Raises InvalidAmount."""
    nano = nano_of(amount)
    if nano < 0:
        raise InvalidAmount(f"{amount:f} must be zero or more")
    return nano
