"""`gptutor user …`: users, their keys and their money. Amounts are roubles."""

import datetime
import sys
from typing import Annotated

import typer
from rich.table import Table

from gptutor.cli.arguments import ID_MAX, row_id, whole_number
from gptutor.cli.console import Json, fail, out, print_json, shown, warn, with_administration, with_database
from gptutor.config.load import load
from gptutor.database.pool import Database
from gptutor.money.administration import CONTACT_MAX, NOTE_MAX, REASON_MAX, REFERENCE_MAX, BookingKind, require_bookable
from gptutor.money.amounts import AccountId, decimal_text, parse_roubles, roubles
from gptutor.money.bookings import Bookings, LedgerEntry
from gptutor.money.key_limits import NAME_MAX
from gptutor.money.keyring import Key
from gptutor.money.records import entry_json, user_details_json, user_json
from gptutor.money.users import FOUND_MAX, User, UserRepository
from gptutor.text import is_one_line

LIST = 100
LIST_MAX = 100_000
NO_USERS = "There are no users yet. `gptutor user create` makes one."
NEGATIVE = {"ignore_unknown_options": True}
"""`-50` is an amount, and no option: a sentence says what to do with a negative one."""

user_app = typer.Typer(help="Users, their keys and their money. Amounts are roubles.", no_args_is_help=True)

UserId = Annotated[
    int, typer.Argument(parser=row_id("the user's id"), metavar="ID", help="The user's id, as `gptutor user list` shows it.")
]
Roubles = Annotated[str, typer.Argument(metavar="ROUBLES", help="An amount in roubles, such as 50, 99.50 or 99,50.")]
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
    name, amount = _line("--name", name, NAME_MAX), parse_roubles(balance)
    if amount:
        require_bookable("topup", amount)
    user, key = with_administration(lambda administration: administration.create_user(name, amount), may_create=True)
    if json:
        print_json(user_json(user) | {"apiKey": key})
    else:
        out.print(f"User {user.account_id}, balance {roubles(user.balance)} roubles. The API key, shown only now:\n\n  {key}\n")


@user_app.command("list")
def user_list(
    limit: Annotated[
        int | None,
        typer.Option(
            parser=whole_number("the limit", 1, LIST_MAX),
            metavar="N",
            help=f"How many users to show: {LIST} unless given, and all with --json.",
            show_default=False,
        ),
    ] = None,
    after: Annotated[
        int,
        typer.Option(parser=whole_number("the id", 0, ID_MAX), metavar="ID", help="Only users with larger ids: the next page."),
    ] = 0,
    json: Json = False,
) -> None:
    """List users by id."""
    most = limit if limit is not None else None if json else LIST

    async def run(database: Database) -> tuple[list[User], int]:
        repository = UserRepository(database)
        return [user async for user in repository.all(after, most)], await repository.count()

    users, count = with_database(run)
    _print_users(users, json, f"No user has an id above {after}." if count else NO_USERS)
    if users and not json and (after or len(users) < count):
        out.print(
            f"{len(users)} of {count} users. The next ones: gptutor user list --after {users[-1].account_id}", highlight=False
        )


@user_app.command("find")
def user_find(
    query: Annotated[
        str,
        typer.Argument(
            metavar="QUERY",
            help="A user's id, a VK id, an API key or its beginning, such as sk-user-17-ab, or words of name and contact.",
        ),
    ],
    json: Json = False,
) -> None:
    """Find users. Words are found by their beginnings, in upper and lower case."""
    found = with_database(lambda database: UserRepository(database).search(query.strip(), FOUND_MAX + 1))
    _print_users(found[:FOUND_MAX], json, f"No user matches {shown(query)}.")
    if len(found) > FOUND_MAX:
        warn(f"More than {FOUND_MAX} users match, and not all are shown. Give more words.")


@user_app.command("show")
def user_show(user_id: UserId, json: Json = False) -> None:
    """Show a user, their identities, and their keys with the limits."""
    details = with_administration(lambda administration: administration.user_details(AccountId(user_id)), read_only=True)
    if json:
        print_json(user_details_json(details))
        return
    _print_user(details.user)
    for label, text in (("contact", details.user.contact), ("note", details.user.note)):
        if text:
            out.print(f"  {label}  {shown(text)}", highlight=False)
    for provider, subject in details.identities:
        out.print(f"  {shown(provider)} {shown(subject)}", highlight=False)
    for key in details.keys:
        out.print(f"  key {key.key_id}  {key.shown}…  {shown(key.name)}  {describe(key)}", highlight=False)


@user_app.command("describe")
def user_describe(
    user_id: UserId,
    name: Annotated[str | None, typer.Option(help="A new name.", show_default=False)] = None,
    contact: Annotated[
        str | None, typer.Option(help="How to reach the user, such as an e-mail address.", show_default=False)
    ] = None,
    note: Annotated[str | None, typer.Option(help="What to remember about the user.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Rename a user, or set the contact or a note. What is not given stays; an empty text removes it."""
    given = {
        field: _line(f"--{field}", text, most)
        for field, text, most in (("name", name, NAME_MAX), ("contact", contact, CONTACT_MAX), ("note", note, NOTE_MAX))
        if text is not None
    }
    if not given:
        raise typer.BadParameter("give --name, --contact or --note.")
    _show(with_administration(lambda administration: administration.describe_user(AccountId(user_id), **given)), json)


@user_app.command("erase")
def user_erase(
    user_id: UserId,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    forfeit: Annotated[bool, typer.Option("--forfeit", help="Take the balance that is left, by an adjustment.")] = False,
    json: Json = False,
) -> None:
    """Erase a user for good: name, contact, note, identities; all keys are revoked. The books stay."""
    if not yes and not _confirmed(user_id):
        fail("Nothing was changed.")
    user = with_administration(lambda administration: administration.erase_user(AccountId(user_id), forfeit=forfeit))
    if json:
        print_json(user_json(user))
        return
    days = load().logs.retention_days
    out.print(
        f"User {user_id} is erased: name, contact, note, identities, and the names and copies of keys are removed, all keys are "
        "revoked, and the account is inactive for good.\n"
        "These stay: ledger entries and requests, which are the books, under the number of the account, with the reasons and "
        f"references as they were booked; log lines, for {days} days; backups, until you delete them.",
        highlight=False,
    )


def _confirmed(user_id: int) -> bool:
    """Asks on the terminal."""
    if not sys.stdin.isatty():
        fail("Erasing cannot be undone. Confirm it with --yes.")
    return typer.confirm(f"Erase user {user_id}? This cannot be undone.", err=True)


@user_app.command("topup", context_settings=NEGATIVE)
def user_topup(user_id: UserId, amount: Roubles, reason: Reason = "", reference: Reference = None, json: Json = False) -> None:
    """Add roubles to a balance."""
    _book(user_id, "topup", amount, reason, reference, json)


@user_app.command("refund", context_settings=NEGATIVE)
def user_refund(user_id: UserId, amount: Roubles, reason: Reason = "", reference: Reference = None, json: Json = False) -> None:
    """Debit roubles that were paid back to the user; they must be available."""
    _book(user_id, "refund", amount, reason, reference, json)


@user_app.command("adjust", context_settings=NEGATIVE)
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
    _book(user_id, "adjustment", amount, reason, reference, json)


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
    limit: Annotated[
        int, typer.Option(parser=whole_number("the limit", 1, 10_000), metavar="N", help="How many entries to show.")
    ] = 50,
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


def _book(user_id: int, kind: BookingKind, amount: str, reason: str, reference: str | None, json: bool) -> None:
    nano = parse_roubles(amount)
    require_bookable(kind, nano)
    reason = _line("--reason", reason, REASON_MAX)
    reference = reference and _line("--reference", reference, REFERENCE_MAX)
    _show(
        with_administration(
            lambda administration: administration.book(AccountId(user_id), kind, nano, reason=reason, reference=reference)
        ),
        json,
    )


def _line(option: str, text: str, most: int) -> str:
    if len(text) > most or not is_one_line(text):
        raise typer.BadParameter(f"{option} must be one line of at most {most} characters.")
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
    table = Table("id", "name", "contact", "balance", "held", "state", "created")
    for user in users:
        table.add_row(
            str(user.account_id),
            shown(user.name),
            shown(user.contact),
            roubles(user.balance),
            roubles(user.held),
            _state(user),
            f"{user.created_at:%Y-%m-%d %H:%M}",
        )
    out.print(table if users else if_none)


def _show(user: User, json: bool) -> None:
    if json:
        print_json(user_json(user))
    else:
        _print_user(user)


def _print_user(user: User) -> None:
    named = f"{user.account_id} {shown(user.name)}".rstrip()
    held = f", {roubles(user.held)} of them held for requests under way" if user.held else ""
    out.print(f"User {named} ({_state(user)}): {roubles(user.balance)} roubles{held}.", highlight=False)


def _state(user: User) -> str:
    return "erased" if user.erased_at else "active" if user.is_active else "inactive"
