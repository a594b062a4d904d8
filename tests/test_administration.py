"""Administration by the command line (contract F10, C11; row money-15): each change leaves an audit line."""

import asyncio
import base64
import csv
import dataclasses
import datetime
import json
import logging
import os
import re
import resource
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest

from gptutor.cli import console
from gptutor.config.schema import ConfigError
from gptutor.database.errors import ConstraintViolated
from gptutor.database.pool import Database
from gptutor.money.administration import Administration
from gptutor.money.amounts import AccountId, Nano, parse_roubles
from gptutor.money.bookings import AlreadyBooked, Bookings
from gptutor.money.holds import HandOver
from gptutor.money.key_limits import InvalidLimit, changed_limits, parse_expiry
from gptutor.money.keyring import KeyLimits, KeyRing, NoSuchKey
from gptutor.money.usage import Cursor
from gptutor.money.users import UserRepository
from gptutor.money.vault import DecryptionFailed, EncryptedKey, Vault, VaultWithoutSecret
from gptutor.telemetry import logs
from gptutor.telemetry.log_writer import logging_to
from tests.support.gateway import SECRET, VAULT, make_client
from tests.support.ledger import hold, ledger_of
from tests.support.service import Service, environment, refused, run, said


def new_user(service: Service, balance: str = "100") -> tuple[str, str]:
    user = service.command("user", "create", "--balance", balance)
    return str(user["id"]), user["apiKey"]


def audit_of(service: Service, number: str) -> list[dict[str, Any]]:
    return [line for line in service.log() if line.get("type") == "audit" and line["userId"] == number]


def test_money_moves_with_a_reason_and_leaves_an_audit_line(service: Service) -> None:
    """Contract C11: to the last digit, in both directions."""
    number, key = new_user(service)
    assert (
        service.command("user", "refund", number, "30.5", "--reason", "asked for it", "--reference", f"r-{number}")["balance"]
        == "69.5"
    )
    assert service.command("user", "adjust", number, "-0.000000001", "--reason", "a test")["balance"] == "69.499999999"
    assert service.command("user", "adjust", number, "+0.5", "--reason", "a test")["balance"] == "69.999999999"
    kinds = [(entry["kind"], entry["amount"]) for entry in service.command("user", "ledger", number)]
    assert kinds == [("adjustment", "0.5"), ("adjustment", "-0.000000001"), ("refund", "-30.5"), ("topup", "100")]
    lines = audit_of(service, number)
    assert [line["what"] for line in lines] == ["create user", "topup", "issue key", "refund", "adjustment", "adjustment"]
    assert {line["who"] for line in lines} == {f"cli:{console.os_user()}"}
    assert (lines[3]["amount"], lines[3]["reference"], lines[3]["reason"]) == ("-30.5", f"r-{number}", "asked for it")
    assert key not in json.dumps(lines)
    assert isinstance(lines[2]["keyId"], int)


def test_keys_have_limits_of_their_own(service: Service) -> None:
    number, _ = new_user(service)
    limits = [
        "--name",
        "bot",
        "--limit",
        "50",
        "--limit-reset",
        "daily",
        "--expires-at",
        "2999-12-31",
        "--requests-per-minute",
        "5",
    ]
    key = service.command("user", "issue-key", number, *limits)
    assert key["apiKey"].startswith(f"sk-user-{number}-")
    assert (key["limit"], key["limit_reset"], key["requests_per_minute"]) == ("50", "daily", 5)
    assert key["expires_at"] == "3000-01-01T00:00:00.000Z"
    changed = service.command("user", "limit-key", number, str(key["id"]), "--limit", "60", "--expires-at", "none")
    assert (changed["limit"], changed["limit_reset"], changed["requests_per_minute"], changed["expires_at"]) == (
        "60",
        "daily",
        5,
        None,
    )
    assert "0 of 60 roubles spent (resets daily), 5 requests per minute" in said(service, "user", "keys", number)
    assert f"key {key['id']}" in said(service, "user", "show", number)
    assert "shown only now (active" in said(service, "user", "issue-key", number)
    lifted = ("--limit-reset", "never", "--requests-per-minute", "none")
    changed = service.command("user", "limit-key", number, str(key["id"]), *lifted)
    assert (changed["limit"], changed["limit_reset"], changed["requests_per_minute"]) == ("60", None, None)
    assert service.command("user", "limit-key", number, str(key["id"]), "--limit", "none")["limit"] is None
    assert "revoked" in said(service, "user", "revoke-key", number, str(key["id"]))
    assert service.command("user", "keys", number)[1]["revoked_at"]
    assert "no active key" in refused(service.environ, "user", "revoke-key", number, str(key["id"]))
    limited = next(line for line in audit_of(service, number) if line["what"] == "limit key")
    assert limited["limits"] == {"limit": "60", "limit_reset": "daily", "requests_per_minute": 5, "expires_at": None}


def test_people_are_found(service: Service) -> None:
    number, key = new_user(service)
    for query in (number, key, key[: len(f"sk-user-{number}-") + 2]):
        assert [user["id"] for user in service.command("user", "find", query)] == [int(number)]
    assert f"│ {number} " in said(service, "user", "find", number)
    assert "No user matches nobody" in said(service, "user", "find", "nobody")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("refund", "ID", "500"), "The refund exceeds the available balance"),
        (("refund", "ID", "-5"), "must be more than zero, not -5"),
        (("refund", "ID", "0"), "must be more than zero"),
        (("refund", "ID", "0.0000000001"), "more than nine decimal places"),
        (("adjust", "ID", "0", "--reason", "x"), "must be other than zero, not 0"),
        (("adjust", "ID", "5"), "Missing option '--reason'"),
        (("adjust", "ID", "5", "--reason", " "), "An adjustment needs a reason"),
        (("adjust", "ID", "-99999999999", "--reason", "x"), "more than 1000000000 roubles"),
        (("adjust", "ID", "1e9999999", "--reason", "x"), "not an amount in roubles"),
        (("adjust", "999999999", "1", "--reason", "x"), "There is no user with this id"),
        (("topup", "ID", "5", "--reason", "x" * 501), "at most 500 characters"),
        (("topup", "ID", "5", "--reference", "a\nb"), "one line"),
        (("issue-key", "ID", "--limit", "-5"), "limit must be from 1, which each request needs"),
        (("issue-key", "ID", "--limit", "0.5"), "limit must be from 1, which each request needs, to 1000000000 roubles, not 0.5"),
        (("issue-key", "ID", "--limit-reset", "daily"), "limit_reset needs a limit"),
        (("issue-key", "ID", "--expires-at", "2020-01-01"), "must be in the future"),
        (("issue-key", "ID", "--expires-at", "31.12.2026"), "must be a day such as"),
        (("issue-key", "ID", "--requests-per-minute", "0"), "from 1 to 1000000"),
        (("issue-key", "ID", "--requests-per-minute", "many"), "must be a whole number"),
        (("issue-key", "999999999"), "There is no user with this id"),
        (("limit-key", "ID", "999999999", "--limit", "5"), "no active key"),
    ],
)
def test_a_mistake_changes_nothing_and_gets_a_sentence(service: Service, arguments: tuple[str, ...], words: str) -> None:
    """Row money-15."""
    number, _ = new_user(service, "10")
    before = len(audit_of(service, number))
    sentence = refused(service.environ, "user", *(number if word == "ID" else word for word in arguments))
    assert words in re.sub(r"[│╭╮╰╯─\s]+", " ", sentence)
    assert service.command("user", "show", number)["balance"] == "10"
    assert len(audit_of(service, number)) == before


async def test_holds_of_unknown_cost_are_listed_without_a_request_to_openrouter(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    """Contract C6: the list of `reconcile`, alone."""
    client = await make_client(database, "100")
    waiting = await hold(database, client, "2.5")
    await ledger_of(database).hand_over(HandOver(client.account_id, waiting.hold_id, "gen-1"))
    environ = own(tmp_path, database_url)
    shown = orjson.loads(run(environ, "holds", "--json").stdout)
    assert (shown["waiting_at_most"], shown["waiting"][0]["generation_id"]) == ("2.5", "gen-1")
    assert "1 holds of unknown cost" in run(environ, "holds").stdout


def own(directory: Path, database_url: str, secret: bytes = SECRET, **settings: str) -> dict[str, str]:
    return environment(directory, DATABASE_URL=database_url, GPTUTOR_SECRET_KEY=base64.b64encode(secret).decode(), **settings)


async def test_an_export_of_any_length_takes_little_memory(database: Database, database_url: str, tmp_path: Path) -> None:
    client = await make_client(database, "1")
    environ = own(tmp_path, database_url)
    little = run(environ, "export", "ledger")
    (entry,) = list(csv.DictReader(little.stdout.splitlines()))
    assert (entry["amount_rub"], entry["user_id"]) == ("1", str(client.account_id))
    assert "1 entries." in little.stderr

    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reason)"
        " SELECT $1, gen_random_uuid(), 'topup', n, 'payments', repeat('x', 110) FROM generate_series(1, 150000) AS n",
        client.account_id,
    )
    await connection.close()
    file = tmp_path / "ledger.csv"
    measured = (
        "import resource, sys; from gptutor.cli.main import app\n"
        "try: app(sys.argv[1:])\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )

    def megabytes(*arguments: str) -> int:
        ended = subprocess.run(
            [sys.executable, "-c", measured, "export", "ledger", *arguments],
            env=environ,
            check=True,
            capture_output=True,
            text=True,
        )
        return int(ended.stdout.split()[-1]) // 1024

    base = megabytes("--to", "2000-01-01", "--out", str(tmp_path / "none.csv"))
    assert megabytes("--out", str(file)) < base + 16
    assert file.stat().st_size > 30_000_000
    with file.open(newline="") as text:
        assert sum(1 for _ in csv.reader(text)) == 150_002
    assert not file.with_name("ledger.csv.part").exists()


async def test_rekey_encrypts_copies_with_the_current_secret(database: Database, database_url: str, tmp_path: Path) -> None:
    """Contract D4: after GPTUTOR_SECRET_KEY was changed; a copy that no known secret decrypts is counted, and its key keeps working."""
    before, current, lost = SECRET, bytes(32), b"x" * 32
    users = UserRepository(database)
    keys = []
    for secret in (before, before, lost):
        user = await users.create()
        keys.append((user.account_id, (await KeyRing(database, Vault([secret])).issue(user.account_id))[0]))
    environ = own(tmp_path, database_url, current, GPTUTOR_SECURITY__OLD_SECRET_KEYS=base64.b64encode(before).decode())
    assert orjson.loads(run(environ, "rekey", "--json").stdout) == {"done": 2, "unreadable": 1}
    output = run(environ, "rekey").stdout
    assert "0 copies were encrypted with the current secret.\n1 copies cannot be decrypted with any configured secret" in output
    ring = KeyRing(database, Vault([current]))
    with pytest.raises(DecryptionFailed):
        await ring.main(keys[2][0])
    knowing = f"{environ['GPTUTOR_SECURITY__OLD_SECRET_KEYS']} {base64.b64encode(lost).decode()}"
    environ["GPTUTOR_SECURITY__OLD_SECRET_KEYS"] = knowing
    assert (
        run(environ, "rekey").stdout == "1 copies were encrypted with the current secret; no copy needs an old secret any more.\n"
    )
    assert run(environ, "rekey").stdout == "All copies are encrypted with the current secret.\n"
    assert [await ring.main(account_id) == key for account_id, key in keys] == [True, True, True]


def test_without_a_writable_log_nothing_is_changed(tmp_path: Path) -> None:
    """A change without its audit line is not made."""
    environ = environment(tmp_path)
    run(environ, "migrate")
    (tmp_path / "logs").write_text("a file where the folder should be")
    ended = run(environ, "user", "create", check=False)
    assert ended.returncode == 1
    assert "cannot be used" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert run(environ, "user", "list", "--json").stdout.strip() == "[]"


async def test_on_a_full_disk_nothing_is_changed(database: Database, database_url: str, tmp_path: Path) -> None:
    """A limit of the size of files fails a write as a full disk does."""
    client = await make_client(database, "1")
    ended = alone(own(tmp_path, database_url), "topup", str(client.account_id), "50", file_bytes_max=10_000)
    assert ended.returncode == 1
    assert f"{tmp_path / 'logs'} cannot be used: File too large." in ended.stderr.replace("\n", " ")
    assert "Traceback" not in ended.stderr
    assert await client.balance() == 1


async def test_a_change_whose_audit_line_is_lost_says_that_it_was_made(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    """The disk fills up after the look: repeating the command would book twice, so it must not look as if it had failed."""
    client = await make_client(database, "1")
    (tmp_path / "logs").mkdir()
    for day in (0, 1):
        date = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=day)
        (tmp_path / "logs" / f"combined-{date:%Y-%m-%d}.log").symlink_to("/dev/full")
    ended = run(own(tmp_path, database_url), "user", "topup", str(client.account_id), "50", "--json")
    assert orjson.loads(ended.stdout)["balance"] == "51"
    assert "The change was made, but its audit line could not be written" in ended.stderr
    assert "Do not repeat the command." in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("form", [(), ("--json",)])
async def test_a_change_whose_result_cannot_be_printed_says_that_it_was_made(
    database: Database, database_url: str, tmp_path: Path, form: tuple[str, ...]
) -> None:
    client = await make_client(database, "1")
    environ = own(tmp_path, database_url)
    ended = alone(environ, "topup", str(client.account_id), "50", *form, stdout="/dev/full")
    assert ended.returncode == 0
    assert "The change was made, but its result could not be printed (No space left on device)." in ended.stderr
    assert "Traceback" not in ended.stderr
    assert await client.balance() == 51
    assert alone(environ, "list", *form, stdout="/dev/full").returncode != 0


def alone(
    environ: dict[str, str], *arguments: str, stdout: str = os.devnull, file_bytes_max: int = resource.RLIM_INFINITY
) -> subprocess.CompletedProcess[str]:
    """`gptutor user <arguments>` in a process of its own."""
    command = [sys.executable, "-m", "gptutor", "user", *arguments]
    limit = (file_bytes_max, file_bytes_max)
    with Path(stdout).open("w") as output:
        return subprocess.run(
            command,
            env=environ,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        )


def test_audit_lines_are_written_at_every_level(tmp_path: Path) -> None:
    with logging_to(tmp_path, level="error", retention_days=1, stdout=False):
        logs.audit("cli:me", "topup", user_id=1, amount_rub="5", reference="r", reason="why")
    (path,) = tmp_path.iterdir()
    line = json.loads(path.read_text())
    assert (line["type"], line["who"], line["what"], line["userId"], line["amount"]) == ("audit", "cli:me", "topup", "1", "5")


def test_limits_are_changed_one_by_one() -> None:
    whole = KeyLimits(parse_expiry("2999-12-31"), parse_roubles("5"), "daily", 7)
    least = parse_roubles("1")
    assert changed_limits(whole, {}, least) == whole
    assert changed_limits(whole, {"limit": None}, least) == KeyLimits(whole.expires_at, None, None, 7)
    assert changed_limits(whole, {"limit_reset": None}, least) == KeyLimits(whole.expires_at, whole.limit, None, 7)
    assert changed_limits(KeyLimits(), {"limit": least}, least) == KeyLimits(limit=least)
    assert changed_limits(KeyLimits(limit=Nano(5)), {"requests_per_minute": 9}, least) == KeyLimits(None, Nano(5), None, 9)
    for limit in (0, least - 1, 10**18 + 1):
        with pytest.raises(InvalidLimit, match="limit must be from 1, which each request needs, to 1000000000 roubles"):
            changed_limits(KeyLimits(), {"limit": Nano(limit)}, least)
    assert parse_expiry("2999-12-31T18:00:00+03:00") == datetime.datetime(2999, 12, 31, 15, tzinfo=datetime.UTC)
    for text in ("", "9999-12-31", "2999-13-01", "2999-12-31T18:00:00", "tomorrow"):
        with pytest.raises(InvalidLimit):
            parse_expiry(text)


async def test_pages_of_entries_have_no_gaps(database: Database) -> None:
    client = await make_client(database, "0")
    bookings = Bookings(database)
    for number in range(1, 6):
        await bookings.book(client.account_id, "topup", Nano(number))
    first = await bookings.entries(client.account_id, 2)
    rest = await bookings.entries(client.account_id, 9, before=Cursor(first[-1].created_at, first[-1].entry_id))
    assert [entry.amount for entry in first + rest] == [5, 4, 3, 2, 1]
    other = await make_client(database, "1")
    assert await bookings.entries(other.account_id, 9, before=Cursor(first[-1].created_at, first[-1].entry_id)) == []


async def test_an_interrupted_rekey_resumes_where_it_stopped(database: Database) -> None:
    """Contract D4: pages are committed one by one."""
    before, current = SECRET, bytes(32)
    old = KeyRing(database, Vault([before]))
    for _ in range(3):
        await old.issue((await UserRepository(database).create()).account_id)
    await old.issue((await UserRepository(database).create()).account_id)
    unknown = KeyRing(database, Vault([b"x" * 32]))
    await unknown.issue((await UserRepository(database).create()).account_id)
    administration = Administration(database, Vault([current, before]), "cli:me")
    assert await administration.stale_copies() == 5
    assert [step async for step in administration.rekey()] == [(4, 1)]
    assert await administration.stale_copies() == 1
    assert [step async for step in administration.rekey()] == [(0, 1)]
    with pytest.raises(NoSuchKey):
        await administration.key(AccountId(1), 10**9)


async def test_an_administrator_rotates_all_keys_of_a_user(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    client = await make_client(database, "1")
    with caplog.at_level(logging.INFO, "gptutor.audit"):
        key = await Administration(database, Vault([SECRET]), "cli:me").rotate_keys(client.account_id)
    (line,) = caplog.records
    assert line.what == "rotate keys"  # type: ignore[attr-defined]
    assert key not in repr(vars(line))
    assert [bool(one.revoked_at) for one in await KeyRing(database, Vault([SECRET])).list(client.account_id)] == [False, True]
    assert len([user async for user in UserRepository(database).all()]) == 1


async def test_a_user_without_a_balance_has_no_entries(database: Database) -> None:
    administration = Administration(database, VAULT, "test")
    user, key = await administration.create_user("poor", Nano(0))
    assert (user.balance, key.startswith("sk-user-")) == (0, True)
    assert await Bookings(database).entries(user.account_id, 10) == []


async def test_a_user_who_cannot_get_a_key_is_not_created(database: Database, database_url: str, tmp_path: Path) -> None:
    """Without GPTUTOR_SECRET_KEY: neither the account nor its balance is left behind, and so the command may be repeated."""
    administration = Administration(database, VaultWithoutSecret(ConfigError("no secret")), "test")
    with pytest.raises(ConfigError):
        await administration.create_user("rich", parse_roubles("100"))
    environ = environment(tmp_path, DATABASE_URL=database_url)
    assert "GPTUTOR_SECRET_KEY" in refused(environ, "user", "create", "--balance", "100")
    assert [user async for user in UserRepository(database).all()] == []


async def test_a_user_is_created_with_balance_and_key_in_one_transaction(database: Database) -> None:
    """A key that cannot be stored takes account and balance with it."""
    taken = Administration(database, VAULT, "test")
    before, _ = await taken.create_user("first", Nano(5))
    users, entry_id = UserRepository(database), uuid.uuid4()
    account_id = await users.next_id()
    key = KeyRing(database, VAULT).make(account_id)
    with pytest.raises(ConstraintViolated):
        await users.create_whole(
            account_id, "second", entry_id, Nano(7), "payments", "", "test", dataclasses.replace(key, key_hash=b"")
        )
    assert [user.account_id async for user in users.all()] == [before.account_id]
    key_id = await users.create_whole(account_id, "second", entry_id, Nano(7), "payments", "", "test", key)
    assert (
        await users.create_whole(account_id, "second", entry_id, Nano(7), "payments", "", "test", key) == key_id
    )  # the reply was lost
    (entry,) = await Bookings(database).entries(account_id, 10)
    assert (entry.amount, (await users.find(account_id)).balance) == (7, 7)
    assert await KeyRing(database, VAULT).main(account_id) == key.key


async def test_a_reference_that_another_transaction_books_at_the_same_time_is_booked_once(
    database: Database, database_url: str
) -> None:
    """Past book_entry, which would have waited for it: the unique index is the last word."""
    client = await make_client(database, "10")
    by_hand = await asyncpg.connect(database_url)
    transaction = by_hand.transaction()
    await transaction.start()
    await by_hand.execute(
        "INSERT INTO ledger (account_id, entry_id, kind, amount_nano, contra, reason, reference)"
        " VALUES ($1, gen_random_uuid(), 'topup', 5, 'payments', '', 'pay:1')",
        client.account_id,
    )
    booking = asyncio.create_task(Bookings(database).book(client.account_id, "topup", Nano(5), reference="pay:1"))
    await asyncio.sleep(0.2)
    await transaction.commit()
    await by_hand.close()
    with pytest.raises(AlreadyBooked):
        await booking


async def test_without_a_secret_every_use_of_the_vault_says_why() -> None:
    vault = VaultWithoutSecret(ConfigError("GPTUTOR_SECRET_KEY is missing"))
    with pytest.raises(ConfigError, match="is missing"):
        vault.encrypt(AccountId(1), b"hash", "sk-user-1-x")
    with pytest.raises(ConfigError, match="is missing"):
        vault.decrypt(AccountId(1), b"hash", EncryptedKey(b"", "id"))
