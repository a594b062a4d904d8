"""Users: found by words, described, listed in pages, and erased on request, while the books stay (contract C9, C11, D1, F10)."""

import re
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import orjson
import pytest

from gptutor.admin.money import NewBooking, NewPayment
from gptutor.admin.users import Erasure, UserDescription
from gptutor.api.keys import KeyLimitsPatch
from gptutor.api.keys import NewKey as NewOwnKey
from gptutor.api.payments import NewPayment as NewOwnPayment
from gptutor.api.payments import Notification
from gptutor.cli.keys import keys_app
from gptutor.cli.main import app as cli
from gptutor.cli.main import main
from gptutor.cli.users import user_app
from gptutor.database.errors import DatabaseUnavailable
from gptutor.database.pool import Database
from gptutor.errors import ApiError
from gptutor.http.json_body import must_be, parse_json_body
from gptutor.money.administration import FORFEITED, Administration
from gptutor.money.amounts import AccountId, Nano, parse_roubles
from gptutor.money.holds import HandOver
from gptutor.money.pending_payments import PendingPayments
from gptutor.money.users import NoSuchUser, NotErasable, UserErased, UserRepository
from gptutor.web import openapi
from tests.support.admin import admin_on
from tests.support.gateway import VAULT, Gateway, make_client
from tests.support.ledger import assert_invariants_hold, hold, ledger_of
from tests.support.service import Service, refused, said
from tests.support.vk import VK, bearer, launch, send, sign_in


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the audit lines say."""
    lines: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr("gptutor.money.administration.audit", lambda actor, action, **rest: lines.append((action, rest)))
    return lines


def administration(database: Database) -> Administration:
    return Administration(database, VAULT, "admin:anna")


# -- finding

PEOPLE = {
    "ivan": ("Иванов Иван", "ivan.ivanov@example.org"),
    "pyotr": ("ПЁТР Сергеев", "+7 (999) 123-45-67"),
    "percent": ("100%_sure", "a\\b'c"),
    "hundred": ("100x", ""),
    "other": ("vk 494075", "Ivanova@EXAMPLE.com"),
}


QUERIES = {
    "иван": ["ivan"],
    "ИВАН": ["ivan"],
    "Иван Иванов": ["ivan"],
    "иван пётр": [],
    "петр": ["pyotr"],
    "Пётр": ["pyotr"],
    "IVANOV": ["ivan", "other"],
    "ivan.ivanov@": ["ivan"],
    "@example.ORG": ["ivan"],
    "example": ["ivan", "other"],
    "(999) 123-45": ["pyotr"],
    "999": ["pyotr"],
    "494075": ["other"],
    "vanov": [],
    "100": ["hundred", "percent"],
    "100%": ["percent"],
    "100%_": ["percent"],
    "100_": [],
    "a\\b": ["percent"],
    "b'c": ["percent"],
    **{hostile: [] for hostile in ("%", "_", "", " ", "'", "\\", ":*", "a:*", "!a", "a|b", "(", "&", "<->", "1" * 19, "я" * 201)},
}


async def test_users_are_found_by_the_beginnings_of_words_and_literally(database: Database) -> None:
    users, of = UserRepository(database), {}
    for label, (name, contact) in PEOPLE.items():
        user = await users.create(name)
        await users.describe(user.account_id, name=None, contact=contact, note="vanov nobody")  # a note is not searched
        of[user.account_id] = label
    found = {query: sorted([of[user.account_id] for user in await users.search(query)]) for query in QUERIES}
    assert found == QUERIES


async def test_a_search_finds_no_more_than_it_may(database: Database) -> None:
    for number in range(8):
        await UserRepository(database).create(f"vk {number}")
    assert len(await UserRepository(database).search("vk", 5)) == 5
    ids = [user.account_id for user in await UserRepository(database).search("vk")]
    assert ids == sorted(ids)
    assert len(ids) == 8


# -- erasing


async def everything(database_url: str) -> str:
    """All rows of all tables, as text."""
    connection = await asyncpg.connect(database_url)
    tables = await connection.fetch("SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'")
    rows = [await connection.fetch(f"SELECT to_jsonb(t)::text FROM {table['relname']} AS t") for table in tables]
    await connection.close()
    return "\n".join(row[0] for found in rows for row in found)


@pytest.mark.parametrize("tuned", [{**VK, "vk": {**VK["vk"], "bonus_rub": Decimal(5)}}])
async def test_an_erased_user_leaves_the_books_and_nothing_else(
    gateway: Gateway, database_url: str, audited: list[tuple[str, dict[str, Any]]]
) -> None:
    """And the same person who signs in again is a new user."""
    first = (await sign_in(gateway))["dbUser"]
    account_id, admin = AccountId(first["id"]), administration(gateway.database)
    await admin.describe_user(account_id, name="Erika Mustermann", contact="erika@example.org", note="met in Berlin")
    secret, _ = await admin.issue_key(account_id, "erikas laptop")
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    async with gateway.session.post(gateway.chat_url, json=body, headers=bearer(secret)) as response:
        assert response.status == 200
    await gateway.idle()
    before = await admin.bookings.entries(account_id, 10)
    needles = ("Erika", "erika", "Berlin", "494075")
    stored = await everything(database_url)
    assert [needle for needle in needles if needle not in stored] == []
    audited.clear()

    with pytest.raises(NotErasable, match=r"The balance of user \d+ is 4\.\d+ roubles, and not 0\. Book what you pay back"):
        await admin.erase_user(account_id)
    assert audited == []
    user = await admin.erase_user(account_id, forfeit=True)
    assert (user.name, user.contact, user.note, user.balance, user.is_active) == ("", "", "", 0, False)
    assert user.erased_at is not None
    entries = await admin.bookings.entries(account_id, 10)
    assert entries[1:] == before
    assert (entries[0].kind, entries[0].reason, entries[0].amount) == ("adjustment", FORFEITED, -sum(e.amount for e in before))
    stored = await everything(database_url)
    assert [needle for needle in needles if needle in stored] == []
    keys = (await admin.user_details(account_id)).keys
    assert [(key.name, key.revoked_at is None) for key in keys] == [("", False), ("", False)]
    assert '"encrypted_key": "' not in stored
    for key in (secret, first["apiKey"]):
        async with gateway.session.get(f"{gateway.url}/v1/credits", headers=bearer(key)) as response:
            assert response.status == 401
    assert [action for action, _ in audited] == ["adjustment", "erase user"]

    assert await admin.erase_user(account_id) == user
    assert len(audited) == 2
    for change in (admin.describe_user(account_id, name="x"), admin.set_active(account_id, True), admin.issue_key(account_id, "x"),
                   admin.rotate_keys(account_id)):  # fmt: skip
        with pytest.raises(UserErased, match=r"was erased on 20\d\d-\d\d-\d\d, for good; create a new user"):
            await change
    assert len(audited) == 2
    await assert_invariants_hold(gateway.database)

    second = (await sign_in(gateway))["dbUser"]
    assert second["id"] != account_id
    assert second["balance"] == 5
    status, _, _ = await send(gateway, "GET", "/vk-test", bearer(launch(user_id=1)))
    assert status == 200
    await assert_invariants_hold(gateway.database)


async def test_a_user_whose_money_is_under_way_is_not_erased(database: Database) -> None:
    client, admin = await make_client(database, "10"), administration(database)
    taken = await hold(database, client, "5")
    for _ in range(2):
        with pytest.raises(NotErasable, match="or their cost is not known yet"):
            await admin.erase_user(client.account_id, forfeit=True)
        await ledger_of(database).hand_over(HandOver(client.account_id, taken.hold_id, "gen-1"))
    other = await make_client(database, "0")
    payments = PendingPayments(database, interval_s=60, interval_max_s=60, give_up_s=60)
    await payments.remember(other.account_id, "p-1")
    with pytest.raises(NotErasable, match="payments that have not ended"):
        await admin.erase_user(other.account_id)
    await payments.forget("p-1")
    assert (await admin.erase_user(other.account_id)).erased_at is not None
    assert (await client.user()).erased_at is None
    with pytest.raises(NoSuchUser):
        await admin.erase_user(AccountId(10**9))


async def test_a_debt_is_written_off_and_a_lost_reply_changes_nothing(
    database: Database, audited: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, admin = await make_client(database, "10"), administration(database)
    await admin.book(client.account_id, "adjustment", Nano(-parse_roubles("12")), reason="x")
    audited.clear()
    with pytest.raises(NotErasable, match="is -2 roubles"):
        await admin.erase_user(client.account_id)
    real, lost = Database.fetchrow, ["erase_user"]

    async def losing(self: Database, name: str, *arguments: Any) -> Any:
        row = await real(self, name, *arguments)
        if name in lost:
            lost.remove(name)
            raise DatabaseUnavailable("the reply was lost")
        return row

    monkeypatch.setattr(Database, "fetchrow", losing)
    assert (await admin.erase_user(client.account_id, forfeit=True)).balance == 0
    assert [(action, rest.get("amount_rub")) for action, rest in audited] == [("adjustment", "2"), ("erase user", None)]
    await assert_invariants_hold(database)


async def test_the_database_itself_keeps_an_erased_account_inactive_and_nameless(database: Database, database_url: str) -> None:
    client = await make_client(database, "0")
    await administration(database).erase_user(client.account_id)
    connection = await asyncpg.connect(database_url)
    for change in ("is_active = TRUE", "name = 'x'", "contact = 'x'", "note = 'x'"):
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute(f"UPDATE accounts SET {change}")
    await connection.close()


# -- the command line


def test_a_user_is_described_found_and_erased_by_commands(service: Service) -> None:
    number = str(service.command("user", "create", "--balance", "3,5")["id"])
    described = service.command(
        "user", "describe", number, "--name", "Zoë Q", "--contact", "zoe@example.net", "--note", "pays late"
    )
    assert (described["name"], described["contact"], described["note"], described["balance"]) == (
        "Zoë Q", "zoe@example.net", "pays late", "3.5",
    )  # fmt: skip
    assert service.command("user", "describe", number, "--note", "")["note"] == ""
    shown = said(service, "user", "show", number)
    assert f"User {number} Zoë Q (active): 3.5 roubles." in shown
    assert "contact  zoe@example.net" in shown
    assert "zoe@example.net" in said(service, "user", "find", "zoe@")
    assert "--yes" in refused(service.environ, "user", "erase", number)
    assert "is 3.5 roubles, and not 0" in refused(service.environ, "user", "erase", number, "--yes")
    assert "log lines, for 30 days" in said(service, "user", "erase", number, "--yes", "--forfeit")
    again = service.command("user", "erase", number, "--yes")
    assert (again["name"], again["balance"], again["is_active"], bool(again["erased_at"])) == ("", "0", False, True)
    assert f"User {number} (erased): 0 roubles." in said(service, "user", "show", number)
    assert "was erased on" in refused(service.environ, "user", "activate", number)
    lines = [line for line in service.log() if line.get("type") == "audit" and line["userId"] == number]
    assert [line["what"] for line in lines[3:]] == ["describe user", "describe user", "adjustment", "erase user"]
    assert lines[3]["fields"] == ["name", "contact", "note"]
    assert "Zoë" not in orjson.dumps(lines).decode()


def test_users_are_listed_in_pages(service: Service) -> None:
    for _ in range(3):
        service.command("user", "create")
    ids = [user["id"] for user in service.command("user", "list")]
    assert [user["id"] for user in service.command("user", "list", "--limit", "2")] == ids[:2]
    assert [user["id"] for user in service.command("user", "list", "--after", str(ids[-2]))] == ids[-1:]
    page = said(service, "user", "list", "--limit", "2")
    assert f"2 of {len(ids)} users. The next ones: gptutor user list --after {ids[1]}" in page
    assert "No user has an id above" in said(service, "user", "list", "--after", str(ids[-1]))


# -- mistakes


@pytest.fixture
def complain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Runs a command that fails before it needs a database, in this process, and returns its error message."""
    monkeypatch.chdir(tmp_path)

    def run_here(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["gptutor", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (1, 2)
        output = capsys.readouterr()
        assert output.out == ""
        return re.sub(r"[│╭╮╰╯─\s]+", " ", output.err)

    return run_here


WORDS_OF_PYTHON = re.compile(r"\b(int|str|NoneType|Decimal|float|bool|dict|regex|datetime|Expected|Traceback)\b|[`$]\.|%Y|<=")
HOSTILE = [
    "",
    " ",
    "null",
    "true",
    "[]",
    "{}",
    "1e400",
    "NaN",
    "Infinity",
    "٣",
    "1_0",
    "1,000.5",
    "1.000,5",
    "1,000",
    "--",
    "'",
    "x" * 5000,
]


@pytest.mark.parametrize(
    "arguments",
    [
        ("user", "show", "X"),
        ("user", "topup", "1", "X"),
        ("user", "adjust", "1", "X", "--reason", "x"),
        ("user", "create", "--balance", "X"),
        ("user", "ledger", "1", "--limit", "X"),
        ("user", "list", "--limit", "X"),
        ("user", "list", "--after", "X"),
        ("user", "issue-key", "1", "--limit", "X"),
        ("user", "issue-key", "1", "--limit-reset", "X"),
        ("user", "issue-key", "1", "--requests-per-minute", "X"),
        ("user", "issue-key", "1", "--expires-at", "X"),
        ("user", "revoke-key", "1", "X"),
        ("export", "ledger", "--from", "X"),
        ("export", "ledger", "--user", "X"),
    ],
    ids=" ".join,
)
def test_a_wrong_argument_gets_a_sentence_without_the_words_of_python(
    complain: Callable[..., str], arguments: tuple[str, ...]
) -> None:
    """Rows money-15, operator-1."""
    for hostile in HOSTILE:
        sentence = complain(*(hostile if word == "X" else word for word in arguments))
        assert "There is no database here" not in sentence, f"{hostile!r} was accepted"
        assert len(sentence) > 20, hostile
        assert not WORDS_OF_PYTHON.search(sentence), sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("create", "--balance", "-5"), "must be more than zero, not -5; to take roubles"),
        (("topup", "1", "-5"), "must be more than zero, not -5; to take roubles, book a refund or a negative adjustment"),
        (("refund", "1", "-5"), "not -5; a refund takes a positive amount from the balance"),
        (("issue-key", "1", "--limit", "-5"), "not -5; without a limit the key may spend the whole balance"),
        (("topup", "1", "1,000.5"), "is ambiguous: write a thousand and a half as 1000.5"),
        (("show", "0"), "the user's id must be a number such as 17, not '0'"),
        (("describe", "1"), "give --name, --contact or --note"),
        (("describe", "1", "--contact", "x" * 201), "--contact must be one line of at most 200 characters"),
        (("describe", "1", "--note", "a\nb"), "--note must be one line of at most 500 characters"),
        (("list", "--limit", "0"), "the limit must be a whole number from 1 to 100000, not '0'"),
        (("erase", "1"), "Erasing cannot be undone. Confirm it with --yes."),
    ],
)
def test_a_mistake_gets_a_sentence_that_says_what_to_do(
    complain: Callable[..., str], arguments: tuple[str, ...], words: str
) -> None:
    assert words in complain("user", *arguments)


def test_every_command_about_users_has_json_and_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(user_app.registered_commands) > 12
    for app in (user_app, keys_app):
        for command in app.registered_commands:
            with pytest.raises(SystemExit):
                cli(["user", str(command.name), "--help"])
            text = capsys.readouterr().out
            assert "--json" in text, command.name
            assert str((command.callback.__doc__ or "").split(".")[0])[:40] in re.sub(r"\s+", " ", text)


# -- over HTTP

STRUCTS = (*openapi.ADMIN_BODIES, NewOwnKey, KeyLimitsPatch, NewOwnPayment, Notification)
VALUES = [b"null", b"true", b"[]", b"{}", b'""', b'" "', b'"1e400"', b"1e400", b'"NaN"', b"NaN", '"٣"'.encode(), b'"1_0"', b"-1", b"1.5",
          b'"1,000.5"', b'"a\\u0000b"', b'"\\ud800"', b'"' + b"x" * 3000 + b'"', b"1" * 401, b'{"a": {"b": [1]}}']  # fmt: skip


def refusal(body: bytes, struct: type[msgspec.Struct]) -> str | None:
    try:
        parse_json_body(body, struct)
    except ApiError as error:
        return error.text
    return None


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: f"{struct.__module__}.{struct.__name__}")
def test_a_wrong_value_in_a_body_gets_a_sentence_without_the_words_of_python(struct: type[msgspec.Struct]) -> None:
    """Contract B2: of each field, and of the body as a whole."""
    bodies = [*VALUES, b"", b"{"]
    for field in msgspec.structs.fields(struct):
        assert must_be(struct, field.encode_name) != f"{field.encode_name} must be None", "the field has no description"
        bodies += [b'{"%s": %s}' % (field.encode_name.encode(), value) for value in VALUES]
    texts = {body[:80]: text for body in bodies if (text := refusal(body, struct))}
    assert {body: text for body, text in texts.items() if WORDS_OF_PYTHON.search(text) or len(text) > 400} == {}
    assert len(texts) > len(bodies) / 2


@pytest.mark.parametrize(
    ("struct", "body", "text"),
    [
        (NewBooking, {"kind": "topup", "amount": "1,000.5"}, "amount: '1,000.5' is ambiguous: write a thousand and a half as 1000.5, "
         "and one as 1, without more separators"),
        (NewBooking, {"kind": "topup", "amount": None}, "amount must be an amount in roubles, such as 99.50"),
        (NewBooking, {"kind": "topup", "amount": 1, "reason": 5}, "reason must be one line of at most 500 printable characters"),
        (NewPayment, {"amount": 1, "reference": "1", "provider": "Ы"}, "provider must be 1 to 32 characters of a to z, 0 to 9, _ and -"),
        (UserDescription, {"contact": "a\nb"}, "contact must be one line of at most 200 printable characters"),
        (Notification, {"event": "e", "object": {"id": 5}}, "object must be an object with the id of a payment or a refund"),
        (Notification, {"event": "e", "object": {}}, "object must be an object with the id of a payment or a refund"),
        (Notification, {"object": {"id": "1"}}, "event must be a string such as payment.succeeded"),
        (Erasure, {"forfeit": "yes"}, "forfeit must be true or false"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_what_is_allowed(struct: type[msgspec.Struct], body: Any, text: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json_body(orjson.dumps(body), struct)
    assert caught.value.text == text


async def test_administrators_describe_find_and_erase_over_http(database_url: str, database: Database, tmp_path: Path) -> None:
    """Contract C11: under the administrator's name."""
    async with admin_on(database_url, database, tmp_path) as admin:
        _, user = await admin.request("POST", "/admin/users", {"balance": "2,5"})
        path = f"/admin/users/{user['id']}"
        status, user = await admin.request("PATCH", path, {"name": "Zoë", "contact": "zoe@example.net"})
        assert (status, user["name"], user["contact"], user["note"], user["balance"]) == (
            200,
            "Zoë",
            "zoe@example.net",
            "",
            "2.5",
        )
        _, user = await admin.request("PATCH", path, {"name": "", "note": "x"})
        assert (user["name"], user["contact"], user["note"]) == ("", "zoe@example.net", "x")
        assert await admin.document("/admin/users?query=EXAMPLE") == {"data": [user], "next_cursor": None, "total": 1}
        assert (await admin.document("/admin/users?query=%25"))["data"] == []
        page = await admin.document("/admin/users?limit=1")
        assert (page["total"], len(page["data"])) == (1, 1)
        _, rotated = await admin.request("POST", f"{path}/rotate-key")
        assert rotated["apiKey"].startswith(f"sk-user-{user['id']}-")
        for body in ({}, {"name": None}, {"note": "x" * 501}, {"contact": "a\u202eb"}, {"balance": 1}):
            assert await admin.request("PATCH", path, body) == (400, "invalid_request")
        assert await admin.request("POST", f"{path}/erase") == (400, "invalid_request")
        status, user = await admin.request("POST", f"{path}/erase", {"forfeit": True})
        assert (status, user["contact"], user["balance"], bool(user["erased_at"])) == (200, "", "0", True)
        assert await admin.request("POST", f"{path}/erase") == (200, user)
        assert await admin.request("POST", f"{path}/rotate-key") == (400, "invalid_request")
        lines = (await admin.audited(8))[3:]
    assert [(line["who"], line["what"]) for line in lines] == [
        ("admin:anna", what) for what in ("describe user", "describe user", "rotate keys", "adjustment", "erase user")
    ]
    assert lines[0]["fields"] == ["name", "contact"]
    assert "zoe" not in orjson.dumps(lines).decode()
