"""`gptutor user keys | issue-key | limit-key | revoke-key`: the API keys of a user and their limits."""

from typing import Annotated, Literal

import typer
from rich.table import Table

from gptutor.cli.arguments import row_id
from gptutor.cli.console import Json, out, print_json, shown, with_administration
from gptutor.cli.users import UserId, describe
from gptutor.config.load import load
from gptutor.money.amounts import AccountId, Nano, nano_of, parse_roubles
from gptutor.money.key_limits import NAME_MAX, InvalidLimit, KeyLimitChanges, changed_limits, parse_expiry
from gptutor.money.keyring import NO_LIMITS, Key
from gptutor.money.records import key_json
from gptutor.text import is_one_line

NONE = "none"

keys_app = typer.Typer()

KeyId = Annotated[
    int, typer.Argument(parser=row_id("the key's id"), metavar="KEY", help="The key's id, as `gptutor user keys` shows it.")
]
Limit = Annotated[str | None, typer.Option(metavar="ROUBLES", help="The most that the key may spend; `none` lifts the limit.")]
LimitReset = Annotated[
    Literal["daily", "never"] | None,
    typer.Option(help="When the spending counted against the limit starts from zero: each day (UTC), or never, the default."),
]
RequestsPerMinute = Annotated[str | None, typer.Option(metavar="N", help="A rate limit of the key; `none` lifts it.")]
ExpiresAt = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="The key's last day (UTC), such as 2026-12-31, or a time with its zone; `none` lifts it."),
]


@keys_app.command("keys")
def user_keys(user_id: UserId, json: Json = False) -> None:
    """Show the keys of a user, their limits and what they have spent."""
    keys = with_administration(lambda administration: administration.user_details(AccountId(user_id)), read_only=True).keys
    if json:
        print_json([key_json(key) for key in keys])
        return
    table = Table("id", "key", "name", "state and limits", "created")
    for key in keys:
        table.add_row(str(key.key_id), f"{key.shown}…", shown(key.name), describe(key), f"{key.created_at:%Y-%m-%d %H:%M}")
    out.print(table if keys else "The user has no keys. `gptutor user issue-key` makes one.")


@keys_app.command("issue-key")
def user_issue_key(
    user_id: UserId,
    name: Annotated[str, typer.Option(help="A name for the key.")] = "",
    limit: Limit = None,
    limit_reset: LimitReset = None,
    requests_per_minute: RequestsPerMinute = None,
    expires_at: ExpiresAt = None,
    json: Json = False,
) -> None:
    """Make another key, with limits of its own. The key is shown once."""
    if len(name) > NAME_MAX or not is_one_line(name):
        raise InvalidLimit(f"--name must be one line of at most {NAME_MAX} characters")
    limits = changed_limits(NO_LIMITS, _changes(limit, limit_reset, requests_per_minute, expires_at), _limit_min())
    secret, key = with_administration(lambda administration: administration.issue_key(AccountId(user_id), name, limits))
    if json:
        print_json(key_json(key) | {"apiKey": secret})
    else:
        out.print(f"Key {key.key_id} of user {user_id}, shown only now ({describe(key)}):\n\n  {secret}\n", highlight=False)


@keys_app.command("limit-key")
def user_limit_key(
    user_id: UserId,
    key_id: KeyId,
    limit: Limit = None,
    limit_reset: LimitReset = None,
    requests_per_minute: RequestsPerMinute = None,
    expires_at: ExpiresAt = None,
    json: Json = False,
) -> None:
    """Change limits of a key; those that are not given stay as they are."""
    changes = _changes(limit, limit_reset, requests_per_minute, expires_at)
    limit_min = _limit_min()
    key = with_administration(lambda administration: administration.limit_key(AccountId(user_id), key_id, changes, limit_min))
    _show(key, json)


@keys_app.command("revoke-key")
def user_revoke_key(user_id: UserId, key_id: KeyId, json: Json = False) -> None:
    """Revoke a key for good: it is rejected from the next request on."""
    _show(with_administration(lambda administration: administration.revoke_key(AccountId(user_id), key_id)), json)


def _changes(
    limit: str | None,
    limit_reset: Literal["daily", "never"] | None,
    requests_per_minute: str | None,
    expires_at: str | None,
) -> KeyLimitChanges:
    """Raises InvalidAmount, InvalidLimit."""
    changes = KeyLimitChanges()
    if limit is not None:
        changes["limit"] = None if limit == NONE else parse_roubles(limit)
    if limit_reset is not None:
        changes["limit_reset"] = None if limit_reset == "never" else limit_reset
    if requests_per_minute is not None:
        changes["requests_per_minute"] = None if requests_per_minute == NONE else _whole_number(requests_per_minute)
    if expires_at is not None:
        changes["expires_at"] = None if expires_at == NONE else parse_expiry(expires_at)
    return changes


def _limit_min() -> Nano:
    """The least that a key's limit may be: the minimum balance. Raises ConfigError."""
    return nano_of(load().billing.balance_min_rub)


def _whole_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise InvalidLimit(f"requests_per_minute must be a whole number or `none`, not {text[:40]!r}")
    return int(text)


def _show(key: Key, json: bool) -> None:
    if json:
        print_json(key_json(key))
    else:
        out.print(f"Key {key.key_id}, {key.shown}…: {describe(key)}.", highlight=False)
