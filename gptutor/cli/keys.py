"""`gptutor user keys | issue-key | limit-key | revoke-key`: the keys of a user and what they may do."""

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from gptutor.cli.console import Json, out, print_json, with_administration
from gptutor.cli.users import UserId, describe
from gptutor.money.amounts import AccountId
from gptutor.money.key_limits import NAME_MAX, InvalidLimit, KeyLimitChanges, changed
from gptutor.money.keyring import NO_LIMITS, CapPeriod, Key
from gptutor.money.records import key_json

NONE = "none"

keys_app = typer.Typer()

KeyId = Annotated[
    int, typer.Argument(metavar="KEY", help="The key's number, as `gptutor user keys` shows it.", min=1, max=2**63 - 1)
]
Cap = Annotated[str | None, typer.Option(metavar="ROUBLES", help="The most that the key may spend; `none` lifts it.")]
Period = Annotated[CapPeriod | None, typer.Option(help="The cap is of a day (UTC), or of all time from now on: the default.")]
Expires = Annotated[
    str | None, typer.Option(metavar="DAY", help="Its last day (UTC), such as 2026-12-31, or a moment; `none` lifts it.")
]
PerMinute = Annotated[str | None, typer.Option(metavar="N", help="Requests per minute; `none` lifts it.")]


@keys_app.command("keys")
def user_keys(user_id: UserId, json: Json = False) -> None:
    """Show the keys of a user, their limits and what they have spent."""
    keys = with_administration(lambda administration: administration.person(AccountId(user_id)), changes=False).keys
    if json:
        print_json([key_json(key) for key in keys])
        return
    table = Table("number", "key", "name", "state and limits", "created")
    for key in keys:
        table.add_row(str(key.key_id), f"{key.shown}…", escape(key.name), describe(key), f"{key.created_at:%Y-%m-%d %H:%M}")
    out.print(table if keys else "The user has no keys. `gptutor user issue-key` makes one.")


@keys_app.command("issue-key")
def user_issue_key(
    user_id: UserId,
    name: Annotated[str, typer.Option(help="A name for it.")] = "",
    cap: Cap = None,
    cap_period: Period = None,
    expires: Expires = None,
    per_minute: PerMinute = None,
    json: Json = False,
) -> None:
    """Make one more key, with limits of its own. The key is shown once."""
    if len(name) > NAME_MAX or not name.isprintable():
        raise InvalidLimit(f"A name is one line of at most {NAME_MAX} characters.")
    limits = changed(NO_LIMITS, _changes(cap, cap_period, expires, per_minute))
    secret, key = with_administration(lambda administration: administration.issue_key(AccountId(user_id), name, limits))
    if json:
        print_json(key_json(key) | {"apiKey": secret})
    else:
        out.print(f"Key {key.key_id} of user {user_id}, shown only now ({describe(key)}):\n\n  {secret}\n", highlight=False)


@keys_app.command("limit-key")
def user_limit_key(
    user_id: UserId,
    key_id: KeyId,
    cap: Cap = None,
    cap_period: Period = None,
    expires: Expires = None,
    per_minute: PerMinute = None,
    json: Json = False,
) -> None:
    """Change the limits of a key; those that are not named stay."""
    changes = _changes(cap, cap_period, expires, per_minute)
    _show(with_administration(lambda administration: administration.limit_key(AccountId(user_id), key_id, changes)), json)


@keys_app.command("revoke-key")
def user_revoke_key(user_id: UserId, key_id: KeyId, json: Json = False) -> None:
    """Refuse a key from the next request on, for ever."""
    _show(with_administration(lambda administration: administration.revoke_key(AccountId(user_id), key_id)), json)


def _changes(cap: str | None, cap_period: CapPeriod | None, expires: str | None, per_minute: str | None) -> KeyLimitChanges:
    changes = KeyLimitChanges()
    if cap is not None:
        changes["cap"] = None if cap == NONE else cap
    if cap_period is not None:
        changes["cap_period"] = cap_period
    if expires is not None:
        changes["expires"] = None if expires == NONE else expires
    if per_minute is not None:
        if per_minute != NONE and not (per_minute.isascii() and per_minute.isdigit() and len(per_minute) <= 9):
            raise InvalidLimit(f"{per_minute[:40]!r} is not a number of requests per minute.")
        changes["per_minute"] = None if per_minute == NONE else int(per_minute)
    return changes


def _show(key: Key, json: bool) -> None:
    if json:
        print_json(key_json(key))
    else:
        out.print(f"Key {key.key_id}, {key.shown}…: {describe(key)}.", highlight=False)
