"""The command line (contract F10): the only place that reads arguments and prints for people.

Every command that touches the books finds the database as the service does, so it works beside a running service and alone.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import orjson
import typer
from rich.console import Console
from rich.table import Table

from gptutor import config, database
from gptutor.config import Config, ConfigError
from gptutor.database import Database
from gptutor.listener import StartError
from gptutor.money.amounts import AccountId, InvalidAmount, Nano, parse_roubles, roubles
from gptutor.money.bookings import AlreadyBooked, Bookings, Entry
from gptutor.money.invariants import check, load_invariants
from gptutor.money.journal import JournalError
from gptutor.money.users import NoSuchUser, User, UserRepository
from gptutor.openrouter.simulator.server import Simulator
from gptutor.serve import database_of, serve, simulated_openrouter

app = typer.Typer(
    name="gptutor",
    help="GPTutor: a prepaid, exactly billed OpenAI-compatible gateway in front of OpenRouter.\n\n"
    "Start with `gptutor serve`: without any settings it runs whole, with an embedded PostgreSQL and a simulated OpenRouter. "
    "Then `gptutor user create --balance 100` makes a user with an API key.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
user_app = typer.Typer(help="Users, their keys and their money. Amounts are roubles.", no_args_is_help=True)
app.add_typer(user_app, name="user")

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
UserId = Annotated[int, typer.Argument(metavar="ID", help="The user's number, as `gptutor user list` shows it.", min=1)]
Roubles = Annotated[str, typer.Argument(metavar="ROUBLES", help="An amount in roubles, such as 50 or 99.50.")]
Reason = Annotated[str, typer.Option(help="Why, for the ledger.")]
Reference = Annotated[
    str | None,
    typer.Option(help="An outside name of the payment. Booking it a second time is refused.", show_default=False),
]

T = TypeVar("T")

# What is piped into a file or another program is not cut to the width of a screen that is not there.
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, soft_wrap=True)


def main() -> None:
    """The entry point: an operator's mistake ends in a sentence and exit code 1, never in a traceback."""
    try:
        app()
    except (ConfigError, StartError, InvalidAmount, JournalError, database.MigrationError, database.DatabaseRefused) as error:
        _fail(str(error))
    except NoSuchUser:
        _fail("There is no user with this id. `gptutor user list` shows them all.")
    except AlreadyBooked as error:
        _fail(f"The reference {error} was booked before; nothing was changed.")
    except database.DatabaseUnavailable as error:
        _fail(f"PostgreSQL does not answer: {error.__cause__ or error}")


# -- the service


@app.command("serve")
def serve_command() -> None:
    """Run the service."""
    asyncio.run(serve(config.load()))


@app.command()
def migrate() -> None:
    """Bring the database up to date."""
    with database_of(config.load()) as settings:
        applied = asyncio.run(database.migrate(settings.database.url))
    out.print(f"Applied: {', '.join(applied)}" if applied else "The database is up to date.")


@app.command()
def simulator() -> None:
    """Run the OpenRouter simulator alone."""

    async def run(settings: Config) -> None:
        pace = settings.simulator
        simulator = Simulator(word_s=pace.word_s, first_word_s=pace.first_word_s)
        async with simulated_openrouter(simulator, pace) as base_url:
            out.print(f"A simulated OpenRouter answers at {base_url}; its own bills are at {base_url[:-7]}/simulator/bills")
            out.print(f"Use it with: OPENROUTER_BASE_URL={base_url} OPENROUTER_API_KEY=sk-or-simulator gptutor serve")
            await asyncio.Event().wait()

    _until_interrupted(run(config.load()))


@app.command()
def docs() -> None:
    """Serve the documentation."""
    from gptutor.web.site import documentation

    async def run(settings: Config) -> None:
        async with documentation(settings) as url:
            out.print(f"The documentation is at {url}")
            await asyncio.Event().wait()

    _until_interrupted(run(config.load()))


@app.command()
def verify() -> None:
    """Prove the books: every invariant, over one snapshot. Exits with 1 and the offending rows if one is broken."""

    async def run(books: Database) -> int:
        broken = number = 0
        total = len(load_invariants())
        async for finding in check(books):
            number += 1
            mark = "[red]BROKEN[/]" if finding.rows else "[green]ok[/]"
            out.print(f"{number:>3}/{total} {mark:<6} {finding.invariant.meaning}", highlight=False)
            for row in finding.rows:
                out.print("        " + ", ".join(f"{name}={value}" for name, value in row.items()), highlight=False)
            broken += bool(finding.rows)
        out.print(f"{broken} of {total} invariants are broken." if broken else f"All {total} invariants hold.")
        return 1 if broken else 0

    if code := _with_books(run, statement_s=86_400):
        raise typer.Exit(code)


# -- users


@user_app.command("create")
def user_create(
    balance: Annotated[str, typer.Option(help="Roubles to begin with.")] = "0",
    name: Annotated[str, typer.Option(help="A name for your own use.")] = "",
    json: Json = False,
) -> None:
    """Create a user with an API key. The key is shown once."""
    amount = _positive(balance, or_zero=True)

    async def run(books: Database) -> tuple[User, str]:
        users = UserRepository(books)
        user = await users.create(name)
        if amount:
            user = await Bookings(books).book(user.account_id, "topup", amount, reason="initial balance")
        return user, await users.issue_key(user.account_id)

    user, key = _with_books(run)
    if json:
        _print_json(_user_json(user) | {"apiKey": key})
    else:
        out.print(f"User {user.account_id}, balance {roubles(user.balance)} roubles. The API key, shown only now:\n\n  {key}\n")


@user_app.command("list")
def user_list(json: Json = False) -> None:
    """List all users."""

    async def run(books: Database) -> list[User]:
        return [user async for user in UserRepository(books).all()]

    users = _with_books(run)
    if json:
        _print_json([_user_json(user) for user in users])
        return
    table = Table("id", "name", "balance", "held", "active", "created")
    for user in users:
        table.add_row(
            str(user.account_id),
            user.name,
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
        users = UserRepository(books)
        user = await users.find(AccountId(user_id))
        keys = [
            {"key": f"{key.shown}…", "name": key.name, "createdAt": key.created_at, "revokedAt": key.revoked_at}
            for key in await users.keys(user.account_id)
        ]
        return user, keys

    user, keys = _with_books(run)
    if json:
        _print_json(_user_json(user) | {"keys": keys})
        return
    _print_user(user)
    for key in keys:
        state = f"revoked {key['revokedAt']:%Y-%m-%d %H:%M}" if key["revokedAt"] else "alive"
        out.print(f"  key {key['key']} {key['name']} ({state})", highlight=False)


@user_app.command("topup")
def user_topup(user_id: UserId, amount: Roubles, reason: Reason = "", reference: Reference = None, json: Json = False) -> None:
    """Add roubles to a balance."""
    nano = _positive(amount)

    async def run(books: Database) -> User:
        return await Bookings(books).book(AccountId(user_id), "topup", nano, reason=reason, reference=reference)

    _show(_with_books(run), json)


@user_app.command("activate")
def user_activate(user_id: UserId, json: Json = False) -> None:
    """Let a user call again."""
    _show(_with_books(lambda books: UserRepository(books).set_active(AccountId(user_id), True)), json)


@user_app.command("deactivate")
def user_deactivate(user_id: UserId, json: Json = False) -> None:
    """Refuse all further requests of a user, from the next one on."""
    _show(_with_books(lambda books: UserRepository(books).set_active(AccountId(user_id), False)), json)


@user_app.command("rotate-key")
def user_rotate_key(user_id: UserId, json: Json = False) -> None:
    """Make a new key; all old ones are dead at once. The key is shown once."""
    key = _with_books(lambda books: UserRepository(books).rotate_key(AccountId(user_id)))
    if json:
        _print_json({"id": user_id, "apiKey": key})
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

    entries = _with_books(run)
    if json:
        _print_json([_entry_json(entry) for entry in entries])
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
            entry.model or "",
            entry.generation_id or entry.reason,
        )
    out.print(table)


# -- shared by the commands


def _with_books(work: Callable[[Database], Awaitable[T]], *, statement_s: float = 60) -> T:
    """Runs `work` on the service's database; the embedded one is started and brought up to date if need be."""
    settings = config.load()

    async def run(url: str) -> T:
        if settings.embedded:
            await database.migrate(url)
        elif pending := await database.pending_migrations(url):
            raise StartError(f"The database lacks the migrations {', '.join(pending)}. Apply them with: gptutor migrate")
        async with database.connected(url, statement_s=statement_s) as books:
            return await work(books)

    with database_of(settings) as grounded:
        return asyncio.run(run(grounded.database.url))


def _until_interrupted(work: Any) -> None:
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        out.print("Stopped.")


def _positive(text: str, *, or_zero: bool = False) -> Nano:
    amount = parse_roubles(text)
    if amount < 0 or (amount == 0 and not or_zero):
        raise InvalidAmount(f"{text} is not an amount to add: it must be more than zero")
    return amount


def _show(user: User, json: bool) -> None:
    if json:
        _print_json(_user_json(user))
    else:
        _print_user(user)


def _print_user(user: User) -> None:
    active = "active" if user.is_active else "inactive"
    held = f", {roubles(user.held)} of them held for requests under way" if user.held else ""
    out.print(f"User {user.account_id} {user.name} ({active}): {roubles(user.balance)} roubles{held}.", highlight=False)


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


def _print_json(value: Any) -> None:
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")


def _fail(sentence: str) -> None:
    err.print(f"[bold red]gptutor:[/] {sentence}", highlight=False)
    raise SystemExit(1)
