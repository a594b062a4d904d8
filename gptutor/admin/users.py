"""`/admin/users…`: users and their keys."""

from typing import Annotated, Literal

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from gptutor.admin.auth import administration_of
from gptutor.admin.responses import data_response
from gptutor.errors import ApiError
from gptutor.http.app_keys import CONFIG
from gptutor.http.body import read_json_body
from gptutor.http.json_body import AN_AMOUNT, Amount, PrintableText, whole
from gptutor.http.query import Query
from gptutor.money.administration import CONTACT_MAX, NOTE_MAX
from gptutor.money.amounts import AccountId, Nano, nano_of
from gptutor.money.key_limits import NAME_MAX, REQUESTS_PER_MINUTE_MAX, KeyLimitChanges, changed_limits, parse_expiry
from gptutor.money.keyring import NO_LIMITS
from gptutor.money.records import key_json, user_details_json, user_json
from gptutor.money.users import FOUND_MAX

PAGE = 100
PAGE_MAX = 1000
ID_MAX = 10**18 - 1


def line(length: int) -> str:
    """The description of a field."""
    return f"one line of at most {length} printable characters"


Name = Annotated[PrintableText, msgspec.Meta(max_length=NAME_MAX, description=line(NAME_MAX))]
Contact = Annotated[PrintableText, msgspec.Meta(max_length=CONTACT_MAX, description=line(CONTACT_MAX))]
Note = Annotated[PrintableText, msgspec.Meta(max_length=NOTE_MAX, description=line(NOTE_MAX))]


class NewUser(msgspec.Struct, forbid_unknown_fields=True):
    name: Name = ""
    balance: Annotated[Amount, msgspec.Meta(description=AN_AMOUNT)] = msgspec.field(default_factory=Amount)


class UserDescription(msgspec.Struct, forbid_unknown_fields=True):
    """An absent field stays as it is; an empty text removes it."""

    name: Annotated[Name | UnsetType, msgspec.Meta(description=line(NAME_MAX))] = UNSET
    contact: Annotated[Contact | UnsetType, msgspec.Meta(description=line(CONTACT_MAX))] = UNSET
    note: Annotated[Note | UnsetType, msgspec.Meta(description=line(NOTE_MAX))] = UNSET


class Erasure(msgspec.Struct, forbid_unknown_fields=True):
    """With `forfeit`, an adjustment takes a balance that is left."""

    forfeit: Annotated[bool, msgspec.Meta(description="true or false")] = False


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
            changes["limit"] = None if self.limit is None else nano_of(self.limit)
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
    """`?query=` finds users by id, VK id, the beginning of a key, or words of name and contact. Without it all users come in
    pages, by id; the first page says how many there are in all."""
    query = Query(request, ("query", "cursor", "limit"))
    users = administration_of(request).users
    if text := (query.text("query") or "").strip():
        found = await users.search(text, FOUND_MAX + 1)
        total = len(found) if len(found) <= FOUND_MAX else None
        return data_response([user_json(user) for user in found[:FOUND_MAX]], next_cursor=None, total=total)
    limit = query.integer("limit", minimum=1, maximum=PAGE_MAX, default=PAGE)
    cursor = query.integer("cursor", minimum=0, maximum=ID_MAX, default=0)
    found = await users.page(cursor, limit + 1)
    page = found[:limit]
    next_cursor = str(page[-1].account_id) if len(found) > limit else None
    total = None if cursor else await users.count()
    return data_response([user_json(user) for user in page], next_cursor=next_cursor, total=total)


async def show_user(request: web.Request) -> web.Response:
    Query(request, ())
    return data_response(user_details_json(await administration_of(request).user_details(account_id_of(request))))


async def create_user(request: web.Request) -> web.Response:
    body = await read_json_body(request, NewUser)
    user, key = await administration_of(request).create_user(body.name, nano_of(body.balance))
    return data_response(user_json(user) | {"apiKey": key}, 201)


async def describe_user(request: web.Request) -> web.Response:
    body = await read_json_body(request, UserDescription)
    given = {field: text for field, text in msgspec.structs.asdict(body).items() if text is not UNSET}
    if not given:
        raise ApiError("invalid_request", "Give name, contact or note")
    return data_response(user_json(await administration_of(request).describe_user(account_id_of(request), **given)))


async def erase_user(request: web.Request) -> web.Response:
    body = await read_json_body(request, Erasure) if request.body_exists else Erasure()
    user = await administration_of(request).erase_user(account_id_of(request), forfeit=body.forfeit)
    return data_response(user_json(user))


async def activate_user(request: web.Request) -> web.Response:
    return data_response(user_json(await administration_of(request).set_active(account_id_of(request), True)))


async def deactivate_user(request: web.Request) -> web.Response:
    return data_response(user_json(await administration_of(request).set_active(account_id_of(request), False)))


async def rotate_keys(request: web.Request) -> web.Response:
    account_id = account_id_of(request)
    key = await administration_of(request).rotate_keys(account_id)
    return data_response({"id": account_id, "apiKey": key}, 201)


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
