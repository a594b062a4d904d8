"""`/v1/keys`: an account's keys, each with limits of its own. Shapes of OpenRouter's provisioning API, where it has them.

Any key of the account may look. Making, limiting and revoking keys takes the main key, or a sign-in: who was given a key with a
cap could otherwise lift it, or make himself one without.
"""

import datetime
import functools
from dataclasses import replace
from decimal import Decimal
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from gptutor.api.auth import KEYRING, MANAGES_KEYS, USER
from gptutor.api.chat.completions import SERVICES
from gptutor.errors import ApiError
from gptutor.http.body import read_json_body
from gptutor.http.json_body import Amount, Form, must_be
from gptutor.http.json_response import amount, answer, moment
from gptutor.money.amounts import NANO_MAX, NANO_PER_RUB, InvalidAmount, Nano, nano_of
from gptutor.money.keyring import KEYS_MAX, NO_LIMITS, Key, KeyLimits, LimitReset, NoSuchKey, TooManyKeys

BODY_BYTES_MAX = 16 * 1024
NAME_CHARACTERS_MAX = 100
END_MAX = datetime.datetime(3000, 1, 1, tzinfo=datetime.UTC)
PACE_MAX = 1_000_000


class KeyLimitsPatch(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Each description completes the sentence "<field> must be …". What is absent stays as it is."""

    limit: Annotated[
        Amount | UnsetType | None,
        Meta(description=f"an amount in roubles from 0 to {NANO_MAX // NANO_PER_RUB} with at most nine decimal places, or null"),
    ] = UNSET
    limit_reset: Annotated[Literal["daily"] | UnsetType | None, Meta(description='"daily", where there is a limit, or null')] = (
        UNSET
    )
    expires_at: Annotated[
        Annotated[datetime.datetime, Meta(tz=True)] | UnsetType | None,
        Meta(description="a time to come before the year 3000, such as 2030-01-31T12:00:00Z, or null"),
    ] = UNSET
    requests_per_minute: Annotated[
        Annotated[int, Meta(ge=1, le=PACE_MAX)] | UnsetType | None,
        Meta(description=f"an integer from 1 to {PACE_MAX}, or null"),
    ] = UNSET


class NewKey(KeyLimitsPatch, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[
        Annotated[str, Meta(min_length=1, max_length=NAME_CHARACTERS_MAX, pattern=r"^[^\x00-\x1f\x7f]*\Z")],
        Meta(description=f"a string of 1 to {NAME_CHARACTERS_MAX} printable characters"),
    ]


async def list_keys(request: web.Request) -> web.Response:
    """Newest first; revoked ones are gone."""
    keys = await request.app[KEYRING].list(request[USER].account_id)
    return answer({"data": [shown(key) for key in keys if key.revoked_at is None]})


async def create_key(request: web.Request) -> web.Response:
    """The only answer that has this key in it."""
    form = await _form(request, NewKey)
    limits = limits_after(form, NO_LIMITS)
    try:
        key, made = await request.app[KEYRING].issue(request[USER].account_id, form.name, limits, beside=True)
    except TooManyKeys:
        raise ApiError("too_many_keys", f"An account may have {KEYS_MAX} keys; revoke one that is not needed") from None
    return answer({"data": shown(made), "key": key}, status=201)


async def limit_key(request: web.Request) -> web.Response:
    form = await _form(request, KeyLimitsPatch)
    keyring, account_id, key_id = request.app[KEYRING], request[USER].account_id, int(request.match_info["key_id"])
    try:
        changed = await keyring.change(account_id, key_id, functools.partial(limits_after, form))
    except NoSuchKey:
        _unknown()
    return answer({"data": shown(changed)})


async def revoke_key(request: web.Request) -> web.Response:
    _require_manager(request)
    try:
        await request.app[KEYRING].revoke(request[USER].account_id, int(request.match_info["key_id"]))
    except NoSuchKey:
        _unknown()
    return answer({"deleted": True})


def limits_after(form: KeyLimitsPatch, before: KeyLimits) -> KeyLimits:
    """The limits that a key has once the form is applied. Raises ApiError."""
    cap = before.limit if isinstance(form.limit, UnsetType) else _cap(form.limit)
    if cap is None:
        limit_reset: LimitReset | None = None
        if form.limit_reset == "daily":
            raise ApiError("invalid_request", must_be(KeyLimitsPatch, "limit_reset"))
    elif isinstance(form.limit_reset, UnsetType):
        limit_reset = before.limit_reset
    else:
        limit_reset = form.limit_reset
    if isinstance(form.expires_at, datetime.datetime) and not datetime.datetime.now(datetime.UTC) < form.expires_at < END_MAX:
        raise ApiError("invalid_request", must_be(KeyLimitsPatch, "expires_at"))
    return KeyLimits(
        expires_at=before.expires_at if isinstance(form.expires_at, UnsetType) else form.expires_at,
        limit=cap,
        limit_reset=limit_reset,
        requests_per_minute=before.requests_per_minute
        if isinstance(form.requests_per_minute, UnsetType)
        else form.requests_per_minute,
    )


def shown(key: Key) -> dict[str, Any]:
    """Amounts in roubles, exact. What a key without a cap has spent is not counted: null."""
    limits = key.limits
    return {
        "id": key.key_id,
        "name": key.name,
        "label": key.shown,
        "is_main": key.is_main,
        "disabled": limits.expires_at is not None and limits.expires_at <= datetime.datetime.now(datetime.UTC),
        "limit": None if limits.limit is None else amount(limits.limit),
        "limit_reset": limits.limit_reset,
        "limit_remaining": None if limits.limit is None else amount(max(0, limits.limit - key.spent - key.held)),
        "usage": None if limits.limit is None else amount(key.spent),
        "held": None if limits.limit is None else amount(key.held),
        "requests_per_minute": limits.requests_per_minute,
        "created_at": moment(key.created_at),
        "expires_at": None if limits.expires_at is None else moment(limits.expires_at),
    }


def _cap(limit: Decimal | None) -> Nano | None:
    """Raises ApiError."""
    try:
        cap = None if limit is None else nano_of(limit)
    except InvalidAmount:
        cap = Nano(-1)
    if cap is not None and cap < 0:
        raise ApiError("invalid_request", must_be(KeyLimitsPatch, "limit"))
    return cap


async def _form(request: web.Request, form: type[Form]) -> Form:
    """The body of one who may change keys. Raises ApiError."""
    _require_manager(request)
    return await read_json_body(request, form, replace(request.app[SERVICES].body_limits, bytes_max=BODY_BYTES_MAX))


def _require_manager(request: web.Request) -> None:
    """Raises ApiError."""
    if not request[MANAGES_KEYS]:
        raise ApiError("main_key_required")


def _unknown() -> NoReturn:
    raise ApiError("not_found", "API key not found") from None
