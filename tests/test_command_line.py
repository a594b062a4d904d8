"""The command line (contract F10; rows operator-1, operator-4, money-15): for people, for scripts, and for mistakes."""

import base64
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import orjson
import pytest

from gptutor import __version__
from gptutor.money import journal
from gptutor.money.amounts import AccountId, Nano
from gptutor.money.holds import HoldFacts, new_id
from gptutor.money.invariants import load_invariants
from gptutor.money.journal_records import HoldRecord
from gptutor.money.pricing import Charge
from tests.support.service import Service, environment, refused, run, running_with, said, start_simulator


def test_an_argument_that_is_not_utf8_gets_a_sentence(service: Service) -> None:
    assert "UTF-8" in refused(service.environ, "user", "create", "--name", "\udcff")


def test_a_missing_output_folder_gets_a_sentence(service: Service, tmp_path: Path) -> None:
    assert "cannot be used" in refused(service.environ, "export", "ledger", "--out", str(tmp_path / "none" / "ledger.csv"))


def test_help_names_the_first_commands(service: Service) -> None:
    first = run(service.environ, check=False).stdout
    for word in ("gptutor serve", "gptutor user create --balance 100", "serve", "migrate", "simulator", "docs", "verify", "user"):
        assert word in first
    assert "rotate-key" in run(service.environ, "user", check=False).stdout


def test_the_version_has_one_source(tmp_path: Path) -> None:
    assert run(environment(tmp_path), "--version").stdout == f"gptutor {__version__}\n"
    assert "version = attr: gptutor.__version__" in (Path(__file__).parent.parent / "setup.cfg").read_text()


def test_the_life_of_a_user_for_scripts(service: Service) -> None:
    user = service.command("user", "create", "--balance", "100.000000001", "--name", "Иван")
    number = str(user["id"])
    assert (user["balance"], user["name"], user["is_active"]) == ("100.000000001", "Иван", True)
    assert (
        service.command("user", "topup", number, "50", "--reason", "card", "--reference", f"pay-{number}")["balance"]
        == "150.000000001"
    )
    assert service.command("user", "deactivate", number)["is_active"] is False
    assert service.command("user", "activate", number)["is_active"] is True
    key = service.command("user", "rotate-key", number)["apiKey"]
    shown = service.command("user", "show", number)
    assert shown["available"] == "150.000000001"
    assert [bool(one["revoked_at"]) for one in shown["keys"]] == [False, True]
    assert shown["keys"][0]["label"] == key[: len(f"sk-user-{number}-") + 4]
    assert user["id"] in {entry["id"] for entry in service.command("user", "list")}
    topup, initial = service.command("user", "ledger", number)
    assert (topup["kind"], topup["amount"], topup["reason"], topup["reference"]) == ("topup", "50", "card", f"pay-{number}")
    assert initial["reason"] == "initial balance"


def test_the_same_for_people(service: Service) -> None:
    assert "shown only now" in said(service, "user", "create", "--balance", "3")
    number = str(service.command("user", "list")[-1]["id"])
    assert "3 roubles" in said(service, "user", "show", number)
    assert "4.5 roubles" in said(service, "user", "topup", number, "1.5")
    assert "inactive" in said(service, "user", "deactivate", number)
    assert "all earlier keys are revoked" in said(service, "user", "rotate-key", number)
    assert "initial balance" in said(service, "user", "ledger", number)
    assert "balance" in said(service, "user", "list")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("user", "show", "999999999"), "There is no user with this id"),
        (("user", "ledger", "999999999"), "There is no user with this id"),
        (("user", "topup", "999999999", "5"), "There is no user with this id"),
        (("user", "topup", "1", "ten"), "not an amount in roubles"),
        (("user", "topup", "1", "0"), "must be more than zero"),
        (("user", "topup", "1", "0.0000000001"), "more than nine decimal places"),
        (("user", "topup", "1", "99999999999"), "more than 1000000000 roubles"),
        (("user", "create", "--balance", "NaN"), "not an amount in roubles"),
        (("export", "ledger", "--from", "2026-02-01", "--to", "2026-01-31"), "--from must not be later than --to."),
        (("export", "ledger", "--user", "999999999"), "There is no user with this id"),
    ],
)
def test_a_mistake_gets_a_sentence(service: Service, arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(service.environ, *arguments)


def test_a_payment_is_not_booked_twice(service: Service) -> None:
    number = str(service.command("user", "create")["id"])
    run(service.environ, "user", "topup", number, "5", "--reference", "twice")
    assert "exists already; nothing was changed" in refused(service.environ, "user", "topup", number, "5", "--reference", "twice")
    assert service.command("user", "show", number)["balance"] == "5"


def test_a_wrong_setting_or_an_unreachable_database_is_one_sentence(service: Service) -> None:
    assert "PORT" in refused({**service.environ, "PORT": "99999"}, "serve")
    unreachable = {
        **service.environ,
        "DATABASE_URL": "postgresql://nobody:secret@127.0.0.1:1/none",
        "GPTUTOR_SECRET_KEY": "A" * 43 + "=",
    }
    for command in (("migrate",), ("user", "list"), ("verify",)):
        sentence = refused(unreachable, *command)
        assert "PostgreSQL does not answer" in sentence
        assert "secret" not in sentence
    assert "GPTUTOR_SECRET_KEY is missing" in refused({**unreachable, "GPTUTOR_SECRET_KEY": ""}, "serve")


@pytest.mark.parametrize(
    "command",
    [
        *(
            ("user", "list"),
            ("user", "show", "1"),
            ("user", "find", "1"),
            ("user", "topup", "1", "5"),
            ("user", "issue-key", "1"),
        ),
        *(("verify",), ("holds",), ("rekey",), ("export", "ledger")),
    ],
)
def test_in_a_wrong_folder_no_database_is_created(tmp_path: Path, command: tuple[str, ...]) -> None:
    """An empty new database would be mistaken for the service's."""
    sentence = refused(environment(tmp_path), *command)
    marker = tmp_path / "var" / "postgres" / "PG_VERSION"
    assert f"There is no database here: DATABASE_URL is not set, and {marker} does not exist. Run this in" in sentence
    assert "`gptutor serve` and `gptutor user create` create a new database." in sentence
    assert list(tmp_path.iterdir()) == []


def test_it_works_alone_on_a_bare_directory(tmp_path: Path) -> None:
    environ = environment(tmp_path)
    place = tmp_path / "var" / "postgres"
    assert f"Applied to the embedded PostgreSQL in {place}: 0001_accounts" in run(environ, "migrate").stdout
    assert f"The embedded PostgreSQL in {place} is up to date." in run(environ, "migrate").stdout
    assert "There are no users yet" in run(environ, "user", "list").stdout
    assert orjson.loads(run(environ, "user", "create", "--balance", "1", "--json").stdout)["balance"] == "1"
    assert f"All {len(load_invariants())} invariants hold" in run(environ, "verify").stdout
    assert running_with(str(tmp_path)) == [], "the embedded PostgreSQL was left running"


def test_broken_invariants_are_shown_and_verify_exits_with_one(tmp_path: Path, postgres: str, database_url: str) -> None:
    secret = base64.b64encode(bytes(32)).decode()  # the key's copy is encrypted with it
    environ = environment(tmp_path, DATABASE_URL=database_url, GPTUTOR_SECRET_KEY=secret)
    run(environ, "user", "create", "--balance", "5")
    corrupt = "import asyncio, asyncpg, sys\n" + (
        "async def main():\n"
        "    connection = await asyncpg.connect(sys.argv[1])\n"
        "    await connection.execute('UPDATE accounts SET balance_nano = balance_nano + 1')\n"
        "asyncio.run(main())"
    )

    subprocess.run([sys.executable, "-c", corrupt, database_url], check=True)
    verified = run(environ, "verify", check=False)
    assert verified.returncode == 1
    assert f"2 of {len(load_invariants())} invariants are broken." in verified.stdout
    assert "balance_nano=5000000001" in verified.stdout


def test_our_totals_are_compared_with_openrouters(service: Service, tmp_path: Path) -> None:
    """Contract C9, C6: charges against `/key` and `/activity`, and every hold of unknown cost with its upper bound."""
    assert "OPENROUTER_API_KEY is not set" in refused(service.environ, "reconcile")
    simulator = start_simulator(tmp_path)
    try:
        environ = environment(
            tmp_path,
            OPENROUTER_BASE_URL=simulator.base_url,
            OPENROUTER_API_KEY="sk-or-x",
            GPTUTOR_OPENROUTER__MANAGEMENT_KEY="sk-or-m",
        )
        run(environ, "migrate")
        today, yesterday = orjson.loads(run(environ, "reconcile", "--json").stdout)["days"]
        assert (today["ours_usd"], today["openrouter_usd"], today["difference_usd"]) == ("0", "0", "0")
        assert yesterday["openrouter_usd"] == "0"
        simulator.spend()
        (today, _) = orjson.loads(run(environ, "reconcile", "--json").stdout)["days"]
        assert today["difference_usd"] == today["openrouter_usd"] != "0"  # a request past the gateway shows
        output = run(environ, "reconcile").stdout
        assert "difference" in output
        assert "0 holds of unknown cost" in output
        assert "cannot be charged" not in output

        with journal.opened(tmp_path / "var" / "journal") as (own, _):
            facts = HoldFacts(Nano(5 * 10**9), Decimal(90), b"12345678", "the-request", "a/b")
            own.record_unbooked(new_id(), HoldRecord(AccountId(7), "gen-1", Charge(Nano(9 * 10**8), Decimal("0.01")), facts))
            own.record_unbooked(new_id(), HoldRecord(AccountId(7)))  # of an earlier release
        billed, unknown = orjson.loads(run(environ, "reconcile", "--json").stdout)["unbooked"]
        assert (billed["user_id"], billed["charge"], billed["cost_usd"], billed["at_most"]) == (7, "0.9", "0.01", "5")
        assert (billed["request_id"], billed["generation_id"], billed["model"]) == ("the-request", "gen-1", "a/b")
        assert (unknown["user_id"], unknown["charge"], unknown["request_id"]) == (7, None, None)
        assert "2 requests cannot be charged" in run(environ, "reconcile").stdout
    finally:
        simulator.stop()
