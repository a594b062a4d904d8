"""A request is found by any of its ids, with its charge, what proved it, and what the log says of it; and each entry of the ledger says
who booked it."""

import datetime
import gzip
import json
import uuid
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest

from gptutor.config.schema import Config
from gptutor.database.pool import Database
from gptutor.money.administration import Bookkeeper
from gptutor.money.amounts import Nano, parse_roubles
from gptutor.money.bookings import Bookings
from gptutor.money.holds import HandOver, HoldRequest, Release, new_id
from gptutor.money.pricing import Ceiling, Charge
from gptutor.money.requests import find_requests
from gptutor.money.users import UserRepository
from gptutor.telemetry import log_search
from gptutor.telemetry.log_search import find_lines, log_files
from tests.support.admin_client import Administrator, administrator_of
from tests.support.gateway import Client, Gateway, config_for, make_client
from tests.support.ledger import claim, hold, ledger_of, settlement
from tests.support.recovery import Generations, journals_in, mortal, process
from tests.support.service import environment, refused, run

TODAY = datetime.datetime.now(datetime.UTC).date()
DAY = datetime.timedelta(days=1)


@pytest.fixture
def config(database_url: str, tmp_path: Path) -> Config:
    return config_for(database_url, "http://127.0.0.1:9", tmp_path)


@pytest.fixture
async def anna(config: Config, database: Database) -> AsyncIterator[Administrator]:
    async with administrator_of(config) as administrator:
        yield administrator


def log(directory: Path, day: datetime.date, *lines: dict[str, Any], suffix: str = ".log") -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / f"combined-{day}{suffix}"
    text = b"".join(orjson.dumps({"timestamp": f"{day} 10:00:00", **line}) + b"\n" for line in lines)
    with path.open("ab") as file:
        file.write(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


async def place(database: Database, client: Client, request_id: str) -> uuid.UUID:
    amount = parse_roubles("5")
    request = HoldRequest(claim(client), new_id(), Ceiling(hold_max=amount, available_min=amount), "a/b", request_id)
    return (await ledger_of(database).hold_funds(request)).hold_id


# -- who booked an entry, and what proved a charge


async def test_each_entry_says_who_booked_it(database: Database, database_url: str, anna: Administrator, tmp_path: Path) -> None:
    """Contract C11: on the entry, not only in a log that is deleted after a month."""
    _, created = await anna.request("POST", "/admin/users", {"balance": "10"})
    number = created["data"]["id"]
    await anna.request("POST", f"/admin/users/{number}/bookings", {"kind": "topup", "amount": "1"})
    await anna.request("POST", "/admin/payments", {"user_id": number, "amount": "2", "reference": "1", "provider": "bank"})
    await Bookkeeper(database, "yookassa").pay(number, Nano(3), "yookassa:1", "payment")
    environ = environment(tmp_path, DATABASE_URL=database_url)
    run(environ, "user", "adjust", str(number), "5", "--reason", "goodwill")
    entries = await anna.data(f"/admin/users/{number}/ledger")
    assert [(entry["kind"], entry["booked_by"]) for entry in reversed(entries)] == [
        ("topup", "admin:anna"), ("topup", "admin:anna"), ("topup", "admin:anna"), ("topup", "yookassa"), ("adjustment", "cli:root"),
    ]  # fmt: skip
    user, _ = await UserRepository(database).of_person("vk", "494075", bonus=parse_roubles("1"))
    assert [entry.booked_by for entry in await Bookings(database).entries(user.account_id, 10)] == ["vk"]


async def test_a_charge_says_what_proved_it(database: Database, tmp_path: Path, anna: Administrator) -> None:
    client, journals = await make_client(database, "100"), tmp_path / "journals"
    stated = await hold(database, client, "5")
    await ledger_of(database).settle(settlement(stated, "0.01"))

    dead = mortal(database, journals)
    kept = await hold(database, client, "5", ledger=dead)
    dead.journal.record_sent(kept.account_id, kept.hold_id)
    dead.journal.record_charge(kept.hold_id, Charge(Nano(9 * 10**8), Decimal("0.01"), 15, 32), "gen-kept")
    looked_up = await hold(database, client, "5")
    await ledger_of(database).hand_over(HandOver(client.account_id, looked_up.hold_id, "gen-looked-up"))
    with process(database, journals, generations=Generations({"gen-looked-up": Decimal("0.02")})) as heir:
        for abandoned in journals_in(journals):
            await heir.recovery.replay(abandoned)
        await heir.recovery.process_due_holds()

    entries = {entry["id"]: entry for entry in await anna.data(f"/admin/users/{client.account_id}/ledger")}
    for one, evidence in ((stated, "response"), (kept, "journal"), (looked_up, "generation")):
        entry = entries[str(one.hold_id)]
        assert (entry["evidence"], entry["booked_by"], entry["request_id"]) == (evidence, None, "r")
        assert client.key.startswith(entry["key"])
        (found,) = await find_requests(database, str(one.hold_id))
        assert found.proof == evidence
    assert (entries[str(kept.hold_id)]["prompt_tokens"], entries[str(kept.hold_id)]["completion_tokens"]) == (15, 32)


async def test_the_ledger_is_exported_with_all_of_it(
    database: Database, database_url: str, anna: Administrator, tmp_path: Path
) -> None:
    client = await make_client(database, "0")
    await Bookings(database, "cli:root").book(client.account_id, "topup", parse_roubles("10"), reason="\u202eа")
    held = await hold(database, client, "5")
    await ledger_of(database).settle(settlement(held, "0.01"))
    environ = environment(tmp_path, DATABASE_URL=database_url)
    text = run(environ, "export", "ledger", "--json").stdout
    assert "\u202e" not in text
    topup, charge = [json.loads(line) for line in text.splitlines()]
    assert (topup["user_id"], topup["amount"], topup["booked_by"], topup["reason"]) == (
        client.account_id,
        "10",
        "cli:root",
        "\u202eа",
    )
    assert (charge["user_id"], charge["request_id"], charge["evidence"]) == (client.account_id, "r", "response")
    assert {**charge, "user_id": None} == {**(await anna.data(f"/admin/users/{client.account_id}/ledger"))[0], "user_id": None}
    async with anna.session.get("http://admin/admin/export/ledger?format=jsonl") as response:
        assert (response.content_type, await response.text()) == ("application/jsonl", text)
    rows = run(environ, "export", "ledger").stdout.splitlines()
    assert rows[0].endswith("rub_per_usd,request_id,key,prompt_tokens,completion_tokens,evidence,booked_by")
    assert rows[2].endswith(f"0.01,90,r,{charge['key']},,,response,")


# -- one request


async def test_a_request_is_found_by_each_of_its_ids(gateway: Gateway, config: Config, database_url: str, tmp_path: Path) -> None:
    client = await gateway.client()
    response, _ = await gateway.chat(client)
    request_id = response.headers["X-Request-ID"]
    environ = environment(tmp_path, DATABASE_URL=database_url)
    document = orjson.loads(run(environ, "request", request_id, "--json").stdout)
    (found,) = document["requests"]
    charged = Decimal(100) - await client.balance()
    assert (found["request_id"], found["user_id"], found["state"], found["evidence"]) == (
        request_id, client.account_id, "settled", "response",
    )  # fmt: skip
    assert Decimal(found["charged"]) == Decimal(found["cost_usd"]) * Decimal(found["rub_per_usd"]) == charged
    assert client.key.startswith(found["key"]["label"])
    assert (found["held"], found["next_lookup_at"]) == ("0", None)
    assert found["prompt_tokens"] > 0 < found["completion_tokens"]
    async with administrator_of(config) as anna:
        for name in (request_id, found["generation_id"], found["id"]):
            assert (await anna.data(f"/admin/requests/{name}"))["requests"] == [found]
    text = run(environ, "request", found["generation_id"]).stdout
    for words in (
        request_id,
        found["key"]["label"],
        "settled",
        "OpenRouter's response stated the cost",
        f"{found['charged']} roubles",
    ):
        assert words in text


async def test_requests_without_a_charge_say_why(database: Database, anna: Administrator) -> None:
    client = await make_client(database, "100")
    ledger = ledger_of(database)
    for name in ("open", "waiting", "released", "unresolved"):
        hold_id = await place(database, client, name)
        if name == "waiting":
            await ledger.hand_over(HandOver(client.account_id, hold_id, "gen-1"))  # type: ignore[arg-type]
        elif name != "open":
            await ledger.release(Release(client.account_id, hold_id, unresolved=name == "unresolved"))  # type: ignore[arg-type]
    told = {}
    for name in ("open", "waiting", "released", "unresolved"):
        (found,) = (await anna.data(f"/admin/requests/{name}"))["requests"]
        told[name] = (found["state"], found["evidence"], found["held"], found["charged"], found["next_lookup_at"] is None)
    assert told == {
        "open": ("open", "none_yet", "5", None, False),
        "waiting": ("awaiting_evidence", "none_yet", "5", None, False),
        "released": ("released", "nothing_bought", "0", None, True),
        "unresolved": ("unresolved", "none", "0", None, True),
    }


async def test_of_an_id_that_many_have_chosen_a_bounded_number_is_shown(database: Database) -> None:
    clients = [await make_client(database, "100") for _ in range(3)]
    for client in clients:
        for _ in range(2):
            await place(database, client, "mine")
    found = await find_requests(database, "mine")
    assert [one.account_id for one in found] == [client.account_id for client in reversed(clients) for _ in range(2)]
    assert len(await find_requests(database, "mine", limit=2)) == 2


# -- what only the log knows


async def test_a_refusal_without_a_hold_is_found_in_the_log(
    anna: Administrator, config: Config, database_url: str, tmp_path: Path
) -> None:
    line = {"level": "info", "message": "HTTP POST /v1/chat/completions 401", "requestId": "r-1", "code": "invalid_key"}
    log(config.paths.logs, TODAY - 3 * DAY, line, {"requestId": "r-10"}, suffix="-1.log.gz")
    log(config.paths.logs, TODAY, {"requestId": "r-2", "message": 'says "requestId":"r-1"'})
    found = await anna.data("/admin/requests/r-1")
    assert found == {"requests": [], "log": [{"timestamp": f"{TODAY - 3 * DAY} 10:00:00", **line}], "log_is_complete": True}
    assert await anna.request("GET", "/admin/requests/nowhere") == (
        404, "Neither the database nor the log has a request with this id",
    )  # fmt: skip
    for odd in ("%00", "x" * 201, "%0a"):
        assert await anna.request("GET", f"/admin/requests/{odd}") == (
            400, "The id of a request has 1 to 200 printable characters",
        )  # fmt: skip
    environ = environment(tmp_path, DATABASE_URL=database_url)
    text = run(environ, "request", "r-1").stdout
    assert "Nothing was held for this request, so it cost nothing." in text
    assert "HTTP POST /v1/chat/completions 401  code=invalid_key" in text
    assert "have a request with this id" in refused(environ, "request", "nowhere")


def test_the_log_of_a_known_request_is_searched_on_its_days_alone(tmp_path: Path) -> None:
    for day in (TODAY - DAY, TODAY):
        log(tmp_path, day, {"requestId": "r", "generationId": "gen"})
    assert [line["timestamp"][:10] for line in find_lines(tmp_path, ["gen"], within_s=60).lines] == [str(TODAY - DAY), str(TODAY)]
    found = find_lines(tmp_path, ["r"], within_s=60, days={TODAY - DAY})
    assert ([line["timestamp"][:10] for line in found.lines], found.is_complete) == ([str(TODAY - DAY)], True)


def test_the_search_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(tmp_path, TODAY, *({"requestId": "r", "number": number} for number in range(log_search.LINES_MAX + 1)))
    found = find_lines(tmp_path, ["r"], within_s=60)
    assert (len(found.lines), found.is_complete) == (log_search.LINES_MAX, False)
    assert find_lines(tmp_path, ["r"], within_s=-1) == log_search.FoundLines([], False)
    monkeypatch.setattr(log_search, "CHUNK_BYTES", 7)  # lines begin in one chunk and end in another
    monkeypatch.setattr(log_search, "LINE_BYTES_MAX", 100)
    path = log(tmp_path, TODAY - DAY, {"requestId": "s"}, {"text": "x" * 300, "requestId": "s"}, {"requestId": "s", "last": True})
    path.write_bytes(path.read_bytes().rstrip())  # the last line may be unfinished
    assert [line.get("last") for line in find_lines(tmp_path, ["s"], within_s=60, days={TODAY - DAY}).lines] == [None, True]


def test_a_file_that_is_damaged_or_being_compressed_spoils_no_search(tmp_path: Path) -> None:
    log(tmp_path, TODAY, {"requestId": "r"})
    log(tmp_path, TODAY, {"requestId": "r"}, suffix=".log.gz")  # … of the same day's file, which is not deleted yet
    assert [path.name for path in log_files(tmp_path)] == [f"combined-{TODAY}.log"]
    assert len(find_lines(tmp_path, ["r"], within_s=60).lines) == 1
    whole = log(tmp_path, TODAY - DAY, {"requestId": "r"}, suffix=".log.gz")
    whole.write_bytes(whole.read_bytes()[:-9])
    (tmp_path / f"combined-{TODAY - 2 * DAY}.log").write_bytes(b'{"requestId":"r"\n{"requestId":"r"}\n')
    found = find_lines(tmp_path, ["r"], within_s=60)
    assert (len(found.lines), found.is_complete) == (2, False)
