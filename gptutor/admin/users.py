"""`/admin/users…`: users and their keys."""

from typing import Annotated, Literal

import msgspec
from aiohttp import web

from gptutor.admin.auth import administration_of
from gptutor.admin.parameters import ID_MAX, account
from gptutor.admin.responses import data_response
from gptutor.http.body import read_json_body
from gptutor.http.json_body import PrintableText
from gptutor.http.query import Query
from gptutor.money.amounts import parse_positive
from gptutor.money.key_limits import NAME_MAX, KeyLimitChanges, changed
from gptutor.money.keyring import NO_LIMITS
from gptutor.money.records import key_json, person_json, user_json

PAGE = 100
PAGE_MAX = 1000


Name = Annotated[PrintableText, msgspec.Meta(max_length=NAME_MAX)]


class NewUser(msgspec.Struct, forbid_unknown_fields=True):
    name: Name = ""
    balance: str = "0"


class KeyForm(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """A key's limits: what is absent stays as it is, null lifts a limit."""

    cap: str | msgspec.UnsetType | None = msgspec.UNSET
    cap_period: Literal["day", "total"] | msgspec.UnsetType | None = msgspec.UNSET
    expires: str | msgspec.UnsetType | None = msgspec.UNSET
    per_minute: int | msgspec.UnsetType | None = msgspec.UNSET

    def changes(self) -> KeyLimitChanges:
        changes = KeyLimitChanges()
        if self.cap is not msgspec.UNSET:
            changes["cap"] = self.cap
        if self.cap_period is not msgspec.UNSET:
            changes["cap_period"] = self.cap_period
        if self.expires is not msgspec.UNSET:
            changes["expires"] = self.expires
        if self.per_minute is not msgspec.UNSET:
            changes["per_minute"] = self.per_minute
        return changes


class NewKey(KeyForm, forbid_unknown_fields=True, rename="camel"):
    name: Name = ""


async def list_users(request: web.Request) -> web.Response:
    """`?query=` finds by id, VK's id, or the beginning of a key; without it pages by id: `?after=&limit=`."""
    asked = Query(request, ("query", "after", "limit"))
    users = administration_of(request).users
    if wanted := (asked.text("query") or "").strip():
        found = await users.search(wanted)
    else:
        after = asked.integer("after", minimum=0, maximum=ID_MAX, default=0)
        found = await users.page(after, asked.integer("limit", minimum=1, maximum=PAGE_MAX, default=PAGE))
    return data_response([user_json(user) for user in found])


async def show_user(request: web.Request) -> web.Response:
    Query(request, ())
    return data_response(person_json(await administration_of(request).person(account(request))))


async def create_user(request: web.Request) -> web.Response:
    form = await read_json_body(request, NewUser)
    user, key = await administration_of(request).create_user(form.name, parse_positive(form.balance, or_zero=True))
    return data_response(user_json(user) | {"apiKey": key}, 201)


async def activate_user(request: web.Request) -> web.Response:
    return data_response(user_json(await administration_of(request).set_active(account(request), True)))


async def deactivate_user(request: web.Request) -> web.Response:
    return data_response(user_json(await administration_of(request).set_active(account(request), False)))


async def list_keys(request: web.Request) -> web.Response:
    Query(request, ())
    person = await administration_of(request).person(account(request))
    return data_response([key_json(key) for key in person.keys])


async def issue_key(request: web.Request) -> web.Response:
    form = await read_json_body(request, NewKey)
    secret, key = await administration_of(request).issue_key(account(request), form.name, changed(NO_LIMITS, form.changes()))
    return data_response(key_json(key) | {"apiKey": secret}, 201)


async def limit_key(request: web.Request) -> web.Response:
    form = await read_json_body(request, KeyForm)
    key_id = int(request.match_info["key_id"])
    return data_response(key_json(await administration_of(request).limit_key(account(request), key_id, form.changes())))


async def revoke_key(request: web.Request) -> web.Response:
    return data_response(
        key_json(await administration_of(request).revoke_key(account(request), int(request.match_info["key_id"])))
    )
