"""`/v1/keys`: an account's API keys, each with limits of its own. Field names are those of OpenRouter's provisioning API.

Every key of the account may list keys. Creating, limiting and revoking needs the main key or a sign-in; otherwise the holder of
a limited key could lift its limit, or create a key without one.
"""

import dataclasses
import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from gptutor.errors import ApiError
from gptutor.http.app_keys import CONFIG, KEYRING, MANAGES_KEYS, USER
from gptutor.http.body import SMALL_BODY_LIMITS, read_json_body
from gptutor.http.json_body import Amount, Body, must_be, whole
from gptutor.http.responses import json_response, timestamp
from gptutor.money.amounts import NANO_MAX, NANO_PER_RUB, InvalidAmount, Nano, nano_of, roubles
from gptutor.money.key_limits import InvalidLimit, require_usable
from gptutor.money.keyring import KEYS_MAX, NO_LIMITS, Key, KeyLimits, LimitReset, NoSuchKey, TooManyKeys
from gptutor.text import ONE_LINE

BODY_LIMITS = dataclasses.replace(SMALL_BODY_LIMITS, bytes_max=16 * 1024)
NAME_CHARACTERS_MAX = 100
EXPIRES_BEFORE = datetime.datetime(3000, 1, 1, tzinfo=datetime.UTC)
REQUESTS_PER_MINUTE_MAX = 1_000_000
LIMIT_MAX = NANO_MAX // NANO_PER_RUB


class KeyLimitsPatch(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Changes of a key's limits; absent fields stay as they are. Descriptions complete the sentence "<field> must be …"."""

    limit: Annotated[
        Amount | UnsetType | None,
        Meta(description=f"an amount from the minimum balance to {LIMIT_MAX} roubles with at most nine decimal places, or null"),
    ] = UNSET
    limit_reset: Annotated[Literal["daily"] | UnsetType | None, Meta(description='"daily" if the key has a limit, or null')] = (
        UNSET
    )
    expires_at: Annotated[
        Annotated[datetime.datetime, Meta(tz=True)] | UnsetType | None,
        Meta(description="a future time before the year 3000, such as 2030-01-31T12:00:00Z, or null"),
    ] = UNSET
    requests_per_minute: Annotated[
        Annotated[int, Meta(ge=1, le=REQUESTS_PER_MINUTE_MAX)]
        | Annotated[float, Meta(ge=1, le=REQUESTS_PER_MINUTE_MAX, multiple_of=1)]
        | UnsetType
        | None,
        Meta(description=f"an integer from 1 to {REQUESTS_PER_MINUTE_MAX}, or null"),
    ] = UNSET


class NewKey(KeyLimitsPatch, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[
        Annotated[str, Meta(min_length=1, max_length=NAME_CHARACTERS_MAX, pattern=ONE_LINE)],
        Meta(description=f"a string of 1 to {NAME_CHARACTERS_MAX} printable characters"),
    ]


async def list_keys(request: web.Request) -> web.Response:
    """Newest first, without revoked keys."""
    keys = await request.app[KEYRING].list(request[USER].account_id)
    return json_response({"data": [key_json(key) for key in keys if key.revoked_at is None]})


async def create_key(request: web.Request) -> web.Response:
    """The only response that contains the new key."""
    new_key = await _read_body(request, NewKey)
    limits = limits_after(new_key, NO_LIMITS, _limit_min(request))
    try:
        secret, key = await request.app[KEYRING].issue(request[USER].account_id, new_key.name, limits, beside=True)
    except TooManyKeys:
        raise ApiError("too_many_keys", f"An account may have {KEYS_MAX} keys; revoke one that is no longer needed") from None
    return json_response({"data": key_json(key), "key": secret}, status=201)


async def limit_key(request: web.Request) -> web.Response:
    patch = await _read_body(request, KeyLimitsPatch)
    keyring, account_id, key_id = request.app[KEYRING], request[USER].account_id, int(request.match_info["key_id"])
    limit_min = _limit_min(request)
    try:
        key = await keyring.change(account_id, key_id, lambda limits: limits_after(patch, limits, limit_min))
    except NoSuchKey:
        _raise_not_found()
    return json_response({"data": key_json(key)})


async def revoke_key(request: web.Request) -> web.Response:
    _require_key_management(request)
    try:
        await request.app[KEYRING].revoke(request[USER].account_id, int(request.match_info["key_id"]))
    except NoSuchKey:
        _raise_not_found()
    return json_response({"deleted": True})


def limits_after(patch: KeyLimitsPatch, before: KeyLimits, limit_min: Nano) -> KeyLimits:
    """The limits of a key once the patch is applied. `limit_min` is the minimum balance. Raises ApiError."""
    limit = before.limit if isinstance(patch.limit, UnsetType) else _limit_nano(patch.limit, limit_min)
    if limit is None:
        limit_reset: LimitReset | None = None
        if patch.limit_reset == "daily":
            raise ApiError("invalid_request", must_be(KeyLimitsPatch, "limit_reset"))
    elif isinstance(patch.limit_reset, UnsetType):
        limit_reset = before.limit_reset
    else:
        limit_reset = patch.limit_reset
    now = datetime.datetime.now(datetime.UTC)
    if isinstance(patch.expires_at, datetime.datetime) and not now < patch.expires_at < EXPIRES_BEFORE:
        raise ApiError("invalid_request", must_be(KeyLimitsPatch, "expires_at"))
    return KeyLimits(
        expires_at=before.expires_at if isinstance(patch.expires_at, UnsetType) else patch.expires_at,
        limit=limit,
        limit_reset=limit_reset,
        requests_per_minute=before.requests_per_minute
        if isinstance(patch.requests_per_minute, UnsetType)
        else whole(patch.requests_per_minute),
    )


def key_json(key: Key) -> dict[str, Any]:
    """Amounts are roubles, exact strings. The spending of a key without a limit is not counted: null."""
    limits = key.limits
    return {
        "id": key.key_id,
        "name": key.name,
        "label": key.shown,
        "is_main": key.is_main,
        "disabled": limits.expires_at is not None and limits.expires_at <= datetime.datetime.now(datetime.UTC),
        "limit": None if limits.limit is None else roubles(limits.limit),
        "limit_reset": limits.limit_reset,
        "limit_remaining": None if limits.limit is None else roubles(max(0, limits.limit - key.spent - key.held)),
        "usage": None if limits.limit is None else roubles(key.spent),
        "held": None if limits.limit is None else roubles(key.held),
        "requests_per_minute": limits.requests_per_minute,
        "created_at": timestamp(key.created_at),
        "expires_at": None if limits.expires_at is None else timestamp(limits.expires_at),
    }


def _limit_nano(limit: Decimal | None, limit_min: Nano) -> Nano | None:
    """Raises ApiError."""
    if limit is None:
        return None
    try:
        nano = nano_of(limit)
        require_usable(nano, limit_min)
    except InvalidAmount:
        raise ApiError("invalid_request", must_be(KeyLimitsPatch, "limit")) from None
    except InvalidLimit as error:
        raise ApiError("invalid_request", str(error)) from None
    return nano


def _limit_min(request: web.Request) -> Nano:
    return nano_of(request.app[CONFIG].billing.balance_min_rub)


async def _read_body(request: web.Request, struct: type[Body]) -> Body:
    """The body, if the client may change keys. Raises ApiError."""
    _require_key_management(request)
    return await read_json_body(request, struct, BODY_LIMITS)


def _require_key_management(request: web.Request) -> None:
    """Raises ApiError."""
    if not request[MANAGES_KEYS]:
        raise ApiError("main_key_required")


def _raise_not_found() -> NoReturn:
    raise ApiError("not_found", "API key not found") from None
