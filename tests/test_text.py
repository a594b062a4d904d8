"""Characters that control a terminal, break lines or reorder text: rejected where names are set, escaped where they are shown."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest

import gptutor.admin.money
import gptutor.admin.users
import gptutor.api.keys
from gptutor.database.pool import Database
from gptutor.money.amounts import parse_roubles
from gptutor.money.bookings import Bookings
from gptutor.money.keyring import KeyRing
from gptutor.money.users import UserRepository
from gptutor.text import escaped, escaped_json, is_one_line
from tests.support.gateway import VAULT
from tests.support.service import Service, environment, refused, run

# fmt: off
UNSAFE = [
    "\0", "\n", "\x1b", "\x7f", "\x80", "\x9b", "\x9f", "\xad", "\u061c", "\u200b", "\u200e", "\u2028", "\u2029", "\u202e",
    "\u2066", "\u2069", "\ufeff", "\U000e0041",
]
# fmt: on
SAFE = ["Иван Петров", "名前", "می\u200cخواهم", "👩\u200d💻", "a\u00a0b", "é"]


@pytest.mark.parametrize("character", UNSAFE, ids=lambda text: f"U+{ord(text):04X}")
def test_an_unsafe_character_is_rejected_where_a_text_is_set_and_escaped_where_it_is_shown(character: str) -> None:
    text = f"a{character}b"
    assert not is_one_line(text)
    assert escaped(text).isascii()
    assert escaped(text).isprintable()
    assert orjson.loads(f'"{escaped(text)}"') == text
    assert orjson.loads(escaped_json(orjson.dumps(text))) == text
    assert escaped_json(orjson.dumps(text)).isascii()
    bodies: list[tuple[Any, dict[str, str]]] = [
        (gptutor.admin.users.NewUser, {"name": text}),
        (gptutor.admin.users.NewKey, {"name": text}),
        (gptutor.admin.money.NewBooking, {"kind": "topup", "amount": "1", "reason": text}),
        (gptutor.admin.money.NewBooking, {"kind": "topup", "amount": "1", "reference": text}),
        (gptutor.api.keys.NewKey, {"name": text}),
    ]
    for struct, body in bodies:
        with pytest.raises(msgspec.ValidationError, match="matching regex"):
            msgspec.convert(body, struct, dec_hook=lambda kind, value: kind(value))


@pytest.mark.parametrize("text", SAFE)
def test_people_may_have_their_names(text: str) -> None:
    assert is_one_line(text)
    assert escaped(text) == text
    assert escaped_json(orjson.dumps(text)) == orjson.dumps(text)
    assert msgspec.convert({"name": text}, gptutor.api.keys.NewKey).name == text


@pytest.mark.parametrize(
    "arguments",
    [("user", "create", "--name"), ("user", "issue-key", "1", "--name"), ("user", "topup", "1", "5", "--reason")],
    ids=lambda arguments: arguments[1],
)
def test_the_command_line_rejects_them(service: Service, arguments: tuple[str, ...]) -> None:
    assert "one line" in refused(service.environ, *arguments, "a\x9b31mb")


async def test_what_is_stored_already_is_escaped_on_a_terminal_in_csv_and_in_json(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    text = "a\x9b31m\u202eb\u2028"
    user = await UserRepository(database).create(text)
    await KeyRing(database, VAULT).issue(user.account_id, text)
    await Bookings(database).book(user.account_id, "topup", parse_roubles("5"), reason=text)
    environ = environment(tmp_path, DATABASE_URL=database_url)
    number = str(user.account_id)
    for command in (
        ("user", "list"),
        ("user", "show", number),
        ("user", "keys", number),
        ("user", "ledger", number),
        ("export", "ledger"),
        ("user", "list", "--json"),
    ):
        shown = (await asyncio.to_thread(run, environ, *command)).stdout
        assert not set(shown) & set("\x9b\u202e\u2028"), command
        assert "a\\u009b31m\\u202eb" in shown, command
    assert json.loads(shown)[0]["name"] == text
