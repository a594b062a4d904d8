"""`gptutor user …`: users, their keys and their money. Amounts are roubles."""

import datetime
from typing import Annotated

import typer
from rich.table import Table

from gptutor.cli.console import Json, out, print_json, shown, with_administration, with_database
from gptutor.database.pool import Database
from gptutor.money.administration import REASON_MAX, REFERENCE_MAX, BookingKind
from gptutor.money.amounts import AccountId, Nano, decimal_text, parse_positive, parse_roubles, roubles
from gptutor.money.bookings import Bookings, LedgerEntry
from gptutor.money.key_limits import NAME_MAX
from gptutor.money.keyring import Key
from gptutor.money.records import entry_json, user_details_json, user_json
from gptutor.money.users import User, UserRepository
from gptutor.text import is_one_line

user_app = typer.Typer(help="Users, their keys and their money. Amounts are roubles.", no_args_is_help=True)

UserId = Annotated[
    int, typer.Argument(metavar="ID", help="The user's id, as `gptutor user list` shows it.", min=1, max=2**63 - 1)
]
Roubles = Annotated[str, typer.Argument(metavar="ROUBLES", help="An amount in roubles, such as 50 or 99.50.")]
Reason = Annotated[str, typer.Option(help="The reason, for the ledger.")]
Reference = Annotated[
    str | None,
    typer.Option(help="The payment's own id. A second booking with the same reference is rejected.", show_default=False),
]


@user_app.command("create")
def user_create(
    balance: Annotated[str, typer.Option(help="The initial balance, in roubles.")] = "0",
    name: Annotated[str, typer.Option(help="A name, for your own use.")] = "",
    json: Json = False,
) -> None:
    """Create a user with an API key. The key is shown once."""
    name, amount = _line(name, NAME_MAX), parse_positive(balance, or_zero=True)
    user, key = with_administration(lambda administration: administration.create_user(name, amount), may_create=True)
    if json:
        print_json(user_json(user) | {"apiKey": key})
    else:
        out.print(f"User {user.account_id}, balance {roubles(user.balance)} roubles. The API key, shown only now:\n\n  {key}\n")


@user_app.command("list")
def user_list(json: Json = False) -> None:
    """List all users."""

    async def run(database: Database) -> list[User]:
        return [user async for user in UserRepository(database).all()]

    _print_users(with_database(run), json, "There are no users yet. `gptutor user create` makes one.")


@user_app.command("find")
def user_find(
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="A user's id, a VK id, or an API key or its beginning, such as sk-user-17-ab.")
    ],
    json: Json = False,
) -> None:
    """Find users."""
    found = with_database(lambda database: UserRepository(database).search(query.strip()))
    _print_users(found, json, f"No user matches {shown(query)}.")


@user_app.command("show")
def user_show(user_id: UserId, json: Json = False) -> None:
    """Show a user, their identities, and their keys with the limits."""
    details = with_administration(lambda administration: administration.user_details(AccountId(user_id)), read_only=True)
    if json:
        print_json(user_details_json(details))
        return
    _print_user(details.user)
    for provider, subject in details.identities:
        out.print(f"  {shown(provider)} {shown(subject)}", highlight=False)
    for key in details.keys:
        out.print(f"  key {key.key_id}  {key.shown}…  {shown(key.name)}  {describe(key)}", highlight=False)


@user_app.command("topup")
def user_topup(user_id: UserId, amount: Roubles, reason: Reason = "", reference: Reference = None, json: Json = False) -> None:
    """Add roubles to a balance."""
    nano = parse_positive(amount)
    _book(user_id, "topup", nano, reason, reference, json)


@user_app.command("refund")
def user_refund(user_id: UserId, amount: Roubles, reason: Reason = "", reference: Reference = None, json: Json = False) -> None:
    """Debit roubles that were paid back to the user; they must be available."""
    nano = parse_positive(amount)
    _book(user_id, "refund", nano, reason, reference, json)


@user_app.command("adjust", context_settings={"ignore_unknown_options": True})
def user_adjust(
    user_id: UserId,
    amount: Annotated[
        str, typer.Argument(metavar="±ROUBLES", help="An amount to add, such as 50 or +50, or to take, such as -50.")
    ],
    reason: Annotated[str, typer.Option(help="The reason, for the ledger.")],
    reference: Reference = None,
    json: Json = False,
) -> None:
    """Correct a balance, upwards or downwards; a reason is required."""
    nano = parse_roubles(amount)
    _book(user_id, "adjustment", nano, reason, reference, json)


@user_app.command("activate")
def user_activate(user_id: UserId, json: Json = False) -> None:
    """Activate a user: their keys work again."""
    _show(with_administration(lambda administration: administration.set_active(AccountId(user_id), True)), json)


@user_app.command("deactivate")
def user_deactivate(user_id: UserId, json: Json = False) -> None:
    """Deactivate a user: their keys are rejected from the next request on."""
    _show(with_administration(lambda administration: administration.set_active(AccountId(user_id), False)), json)


@user_app.command("rotate-key")
def user_rotate_key(user_id: UserId, json: Json = False) -> None:
    """Revoke all keys of a user and make a new one. The key is shown once."""
    key = with_administration(lambda administration: administration.rotate_keys(AccountId(user_id)))
    if json:
        print_json({"id": user_id, "apiKey": key})
    else:
        out.print(f"The new API key of user {user_id}, shown only now; all earlier keys are revoked:\n\n  {key}\n")


@user_app.command("ledger")
def user_ledger(
    user_id: UserId,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many entries to show.")] = 50,
    json: Json = False,
) -> None:
    """Show a user's ledger entries, newest first."""

    async def run(database: Database) -> list[LedgerEntry]:
        await UserRepository(database).find(AccountId(user_id))
        return await Bookings(database).entries(AccountId(user_id), limit)

    entries = with_database(run)
    if json:
        print_json([entry_json(entry) for entry in entries])
        return
    table = Table("time", "kind", "roubles", "dollars", "rate", "model", "tokens", "key or booked by", "request id or reason")
    for column in table.columns:
        column.no_wrap = True
    for entry in entries:
        table.add_row(
            f"{entry.created_at:%Y-%m-%d %H:%M:%S}",
            entry.kind,
            roubles(entry.amount),
            "" if entry.cost_usd is None else decimal_text(entry.cost_usd),
            "" if entry.rub_per_usd is None else decimal_text(entry.rub_per_usd),
            shown(entry.model or ""),
            _tokens(entry),
            shown(entry.key or entry.booked_by or ""),
            shown(entry.request_id or entry.reason),
        )
    out.print(table)


def _tokens(entry: LedgerEntry) -> str:
    """Of the prompt and of the output, where they are known."""
    counts = (entry.prompt_tokens, entry.completion_tokens)
    return "" if counts == (None, None) else " + ".join("?" if count is None else str(count) for count in counts)


def _book(user_id: int, kind: BookingKind, amount: Nano, reason: str, reference: str | None, json: bool) -> None:
    _show(
        with_administration(
            lambda administration: administration.book(
                AccountId(user_id),
                kind,
                amount,
                reason=_line(reason, REASON_MAX),
                reference=reference and _line(reference, REFERENCE_MAX),
            )
        ),
        json,
    )


def _line(text: str, most: int) -> str:
    if len(text) > most or not is_one_line(text):
        raise typer.BadParameter(f"the text must be one line of at most {most} characters")
    return text


def describe(key: Key) -> str:
    """The state and the limits of a key, for people."""
    limits = key.limits
    if key.revoked_at is not None:
        return f"revoked {key.revoked_at:%Y-%m-%d %H:%M}"
    expired = limits.expires_at is not None and limits.expires_at <= datetime.datetime.now(datetime.UTC)
    parts = ["expired" if expired else "active"]
    if key.is_main:
        parts.append("main")
    if limits.limit is not None:
        reset = "resets daily" if limits.limit_reset == "daily" else "never resets"
        parts.append(f"{roubles(key.spent)} of {roubles(limits.limit)} roubles spent ({reset})")
    if limits.requests_per_minute is not None:
        parts.append(f"{limits.requests_per_minute} requests per minute")
    if limits.expires_at is not None:
        parts.append(f"{'expired' if expired else 'expires'} at {limits.expires_at:%Y-%m-%d %H:%M} UTC")
    return ", ".join(parts)


def _print_users(users: list[User], json: bool, if_none: str) -> None:
    if json:
        print_json([user_json(user) for user in users])
        return
    table = Table("id", "name", "balance", "held", "active", "created")
    for user in users:
        table.add_row(
            str(user.account_id),
            shown(user.name),
            roubles(user.balance),
            roubles(user.held),
            "yes" if user.is_active else "no",
            f"{user.created_at:%Y-%m-%d %H:%M}",
        )
    out.print(table if users else if_none)


def _show(user: User, json: bool) -> None:
    if json:
        print_json(user_json(user))
    else:
        _print_user(user)


def _print_user(user: User) -> None:
    active = "active" if user.is_active else "inactive"
    held = f", {roubles(user.held)} of them held for requests under way" if user.held else ""
    out.print(f"User {user.account_id} {shown(user.name)} ({active}): {roubles(user.balance)} roubles{held}.", highlight=False)
