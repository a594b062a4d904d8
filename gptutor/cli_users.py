"""`gptutor user …`: users, their keys and their money. Amounts are roubles."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from gptutor.console import Json, out, print_json, vault, with_books
from gptutor.database import Database
from gptutor.money.amounts import AccountId, InvalidAmount, Nano, parse_roubles, roubles
from gptutor.money.bookings import Bookings, Entry
from gptutor.money.keyring import KeyRing
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
    amount = _positive(balance, or_zero=True)
    the_vault = vault()

    async def run(books: Database) -> tuple[User, str]:
        users = UserRepository(books)
        user = await users.create(name)
        if amount:
            user = await Bookings(books).book(user.account_id, "topup", amount, reason="initial balance")
        key, _ = await KeyRing(books, the_vault).issue(user.account_id)
        return user, key

    user, key = with_books(run)
    if json:
        print_json(_user_json(user) | {"apiKey": key})
    else:
        out.print(f"User {user.account_id}, balance {roubles(user.balance)} roubles. The API key, shown only now:\n\n  {key}\n")


@user_app.command("list")
def user_list(json: Json = False) -> None:
    """List all users."""

    async def run(books: Database) -> list[User]:
        return [user async for user in UserRepository(books).all()]

    users = with_books(run)
    if json:
        print_json([_user_json(user) for user in users])
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
    out.print(table if users else "There are no users yet. `gptutor user create` makes one.")


@user_app.command("show")
def user_show(user_id: UserId, json: Json = False) -> None:
    """Show one user and the keys."""

    async def run(books: Database) -> tuple[User, list[dict[str, Any]]]:
        user = await UserRepository(books).find(AccountId(user_id))
        keys = [
            {"key": f"{key.shown}…", "name": key.name, "createdAt": key.created_at, "revokedAt": key.revoked_at}
            for key in await KeyRing(books, vault()).list(user.account_id)
        ]
        return user, keys

    user, keys = with_books(run)
    if json:
        print_json(_user_json(user) | {"keys": keys})
        return
    _print_user(user)
    for key in keys:
        state = f"revoked {key['revokedAt']:%Y-%m-%d %H:%M}" if key["revokedAt"] else "alive"
        out.print(f"  key {key['key']} {escape(key['name'])} ({state})", highlight=False)


@user_app.command("topup")
def user_topup(user_id: UserId, amount: Roubles, reason: Reason = "", reference: Reference = None, json: Json = False) -> None:
    """Add roubles to a balance."""
    nano = _positive(amount)

    async def run(books: Database) -> User:
        return await Bookings(books).book(AccountId(user_id), "topup", nano, reason=reason, reference=reference)

    _show(with_books(run), json)


@user_app.command("activate")
def user_activate(user_id: UserId, json: Json = False) -> None:
    """Let a user call again."""
    _show(with_books(lambda books: UserRepository(books).set_active(AccountId(user_id), True)), json)


@user_app.command("deactivate")
def user_deactivate(user_id: UserId, json: Json = False) -> None:
    """Refuse all further requests of a user, from the next one on."""
    _show(with_books(lambda books: UserRepository(books).set_active(AccountId(user_id), False)), json)


@user_app.command("rotate-key")
def user_rotate_key(user_id: UserId, json: Json = False) -> None:
    """Make a new key; all old ones are dead at once. The key is shown once."""
    the_vault = vault()

    async def run(books: Database) -> str:
        await UserRepository(books).find(AccountId(user_id))
        return await KeyRing(books, the_vault).renew(AccountId(user_id), others_too=True)

    key = with_books(run)
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

    async def run(books: Database) -> list[Entry]:
        await UserRepository(books).find(AccountId(user_id))
        return await Bookings(books).entries(AccountId(user_id), limit)

    entries = with_books(run)
    if json:
        print_json([_entry_json(entry) for entry in entries])
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


def _positive(text: str, *, or_zero: bool = False) -> Nano:
    amount = parse_roubles(text)
    if amount < 0 or (amount == 0 and not or_zero):
        raise InvalidAmount(f"{text} is not an amount to add: it must be more than zero")
    return amount


def _show(user: User, json: bool) -> None:
    if json:
        print_json(_user_json(user))
    else:
        _print_user(user)


def _print_user(user: User) -> None:
    active = "active" if user.is_active else "inactive"
    held = f", {roubles(user.held)} of them held for requests under way" if user.held else ""
    out.print(f"User {user.account_id} {escape(user.name)} ({active}): {roubles(user.balance)} roubles{held}.", highlight=False)


def _user_json(user: User) -> dict[str, Any]:
    return {
        "id": user.account_id,
        "name": user.name,
        "balance": roubles(user.balance),
        "held": roubles(user.held),
        "available": roubles(user.available),
        "isActive": user.is_active,
        "createdAt": user.created_at,
        "updatedAt": user.updated_at,
    }


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {
        "id": str(entry.entry_id),
        "kind": entry.kind,
        "amount": roubles(entry.amount),
        "costUsd": None if entry.cost_usd is None else f"{entry.cost_usd:f}",
        "rubPerUsd": None if entry.rub_per_usd is None else f"{entry.rub_per_usd:f}",
        "model": entry.model,
        "generationId": entry.generation_id,
        "contra": entry.contra,
        "reason": entry.reason,
        "reference": entry.reference,
        "createdAt": entry.created_at,
    }
