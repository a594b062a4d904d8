"""`gptutor user …`: users, their keys and their money. Amounts are roubles."""

import datetime
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from gptutor.cli.console import Json, out, print_json, with_administration, with_books
from gptutor.database.pool import Database
from gptutor.money.administration import REASON_MAX, REFERENCE_MAX, BookingKind
from gptutor.money.amounts import AccountId, Nano, parse_positive, parse_roubles, roubles
from gptutor.money.bookings import Bookings, LedgerEntry
from gptutor.money.keyring import Key
from gptutor.money.records import entry_json, person_json, user_json
from gptutor.money.users import User, UserRepository

user_app = typer.Typer(help="Users, their keys and their money. Amounts are roubles.", no_args_is_help=True)

UserId = Annotated[
    int, typer.Argument(metavar="ID", help="The user's number, as `gptutor user list` shows it.", min=1, max=2**63 - 1)
]
Roubles = Annotated[str, typer.Argument(metavar="ROUBLES", help="An amount in roubles, such as 50 or 99.50.")]
Reason = Annotated[str, typer.Option(help="Why, for the ledger.")]
Reference = Annotated[
    str | None, typer.Option(help="An outside name of the payment. Booking it a second time is refused.", show_default=False)
]


@user_app.command("create")
def user_create(
    balance: Annotated[str, typer.Option(help="Roubles to begin with.")] = "0",
    name: Annotated[str, typer.Option(help="A name for your own use.")] = "",
    json: Json = False,
) -> None:
    """Create a user with an API key. The key is shown once."""
    amount = parse_positive(balance, or_zero=True)
    user, key = with_administration(lambda administration: administration.create_user(name, amount), begins=True)
    if json:
        print_json(user_json(user) | {"apiKey": key})
    else:
        out.print(f"User {user.account_id}, balance {roubles(user.balance)} roubles. The API key, shown only now:\n\n  {key}\n")


@user_app.command("list")
def user_list(json: Json = False) -> None:
    """List all users."""

    async def run(books: Database) -> list[User]:
        return [user async for user in UserRepository(books).all()]

    _print_users(with_books(run), json, "There are no users yet. `gptutor user create` makes one.")


@user_app.command("find")
def user_find(
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="An id, VK's id, or a key or its beginning, such as sk-user-17-ab.")
    ],
    json: Json = False,
) -> None:
    """Find users."""
    found = with_books(lambda books: UserRepository(books).search(query.strip()))
    _print_users(found, json, f"Nobody is found by {escape(query)}.")


@user_app.command("show")
def user_show(user_id: UserId, json: Json = False) -> None:
    """Show one user, who he is outside, and the keys with their limits."""

    person = with_administration(lambda administration: administration.person(AccountId(user_id)), changes=False)
    if json:
        print_json(person_json(person))
        return
    _print_user(person.user)
    for provider, subject in person.identities:
        out.print(f"  {escape(provider)} {escape(subject)}", highlight=False)
    for key in person.keys:
        out.print(f"  key {key.key_id}  {key.shown}…  {escape(key.name)}  {describe(key)}", highlight=False)


@user_app.command("topup")
def user_topup(user_id: UserId, amount: Roubles, reason: Reason = "", reference: Reference = None, json: Json = False) -> None:
    """Add roubles to a balance."""
    nano = parse_positive(amount)
    _book(user_id, "topup", nano, reason, reference, json)


@user_app.command("refund")
def user_refund(user_id: UserId, amount: Roubles, reason: Reason = "", reference: Reference = None, json: Json = False) -> None:
    """Take roubles that were paid back to the user; they must be available."""
    nano = parse_positive(amount)
    _book(user_id, "refund", nano, reason, reference, json)


@user_app.command("adjust", context_settings={"ignore_unknown_options": True})
def user_adjust(
    user_id: UserId,
    amount: Annotated[str, typer.Argument(metavar="±ROUBLES", help="What is added, such as 50 or +50, or taken, such as -50.")],
    reason: Annotated[str, typer.Option(help="Why, for the ledger.")],
    reference: Reference = None,
    json: Json = False,
) -> None:
    """Correct a balance, upwards or downwards; needs a reason."""
    nano = parse_roubles(amount)
    _book(user_id, "adjustment", nano, reason, reference, json)


@user_app.command("activate")
def user_activate(user_id: UserId, json: Json = False) -> None:
    """Let a user call again."""
    _show(with_administration(lambda administration: administration.set_active(AccountId(user_id), True)), json)


@user_app.command("deactivate")
def user_deactivate(user_id: UserId, json: Json = False) -> None:
    """Refuse all further requests of a user, from the next one on."""
    _show(with_administration(lambda administration: administration.set_active(AccountId(user_id), False)), json)


@user_app.command("rotate-key")
def user_rotate_key(user_id: UserId, json: Json = False) -> None:
    """Make a new key; all old ones are dead at once. The key is shown once."""
    key = with_administration(lambda administration: administration.renew_keys(AccountId(user_id)))
    if json:
        print_json({"id": user_id, "apiKey": key})
    else:
        out.print(f"The new API key of user {user_id}, shown only now; the old ones are dead:\n\n  {key}\n")


@user_app.command("ledger")
def user_ledger(
    user_id: UserId,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many entries.")] = 50,
    json: Json = False,
) -> None:
    """Show a user's entries, newest first."""

    async def run(books: Database) -> list[LedgerEntry]:
        await UserRepository(books).find(AccountId(user_id))
        return await Bookings(books).entries(AccountId(user_id), limit)

    entries = with_books(run)
    if json:
        print_json([entry_json(entry) for entry in entries])
        return
    table = Table("time", "kind", "roubles", "dollars", "rate", "model", "generation or reason")
    for column in table.columns:
        column.no_wrap = True
    for entry in entries:
        table.add_row(
            f"{entry.created_at:%Y-%m-%d %H:%M:%S}",
            entry.kind,
            roubles(entry.amount),
            "" if entry.cost_usd is None else f"{entry.cost_usd:f}",
            "" if entry.rub_per_usd is None else f"{entry.rub_per_usd:f}",
            escape(entry.model or ""),
            escape(entry.generation_id or entry.reason),
        )
    out.print(table)


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
    if len(text) > most or not text.isprintable():
        raise typer.BadParameter(f"a text of one line, with at most {most} characters, is expected")
    return text


def describe(key: Key) -> str:
    """The state and the limits of a key, for people."""
    limits = key.limits
    if key.revoked_at is not None:
        return f"revoked {key.revoked_at:%Y-%m-%d %H:%M}"
    facts = ["alive"]
    if key.is_main:
        facts.append("main")
    if limits.cap is not None:
        facts.append(f"{roubles(key.spent)} of {roubles(limits.cap)} roubles spent ({limits.cap_period})")
    if limits.per_minute is not None:
        facts.append(f"{limits.per_minute} requests per minute")
    if limits.expires_at is not None:
        ended = limits.expires_at <= datetime.datetime.now(datetime.UTC)
        facts.append(f"{'ended' if ended else 'until'} {limits.expires_at:%Y-%m-%d %H:%M} UTC")
    return ", ".join(facts)


def _print_users(users: list[User], json: bool, nobody: str) -> None:
    if json:
        print_json([user_json(user) for user in users])
        return
    table = Table("id", "name", "balance", "held", "active", "created")
    for user in users:
        table.add_row(
            str(user.account_id),
            escape(user.name),
            roubles(user.balance),
            roubles(user.held),
            "yes" if user.is_active else "no",
            f"{user.created_at:%Y-%m-%d %H:%M}",
        )
    out.print(table if users else nobody)


def _show(user: User, json: bool) -> None:
    if json:
        print_json(user_json(user))
    else:
        _print_user(user)


def _print_user(user: User) -> None:
    active = "active" if user.is_active else "inactive"
    held = f", {roubles(user.held)} of them held for requests under way" if user.held else ""
    out.print(f"User {user.account_id} {escape(user.name)} ({active}): {roubles(user.balance)} roubles{held}.", highlight=False)
