"""What clients really send reaches OpenRouter as they spelled it: bodies recorded from real libraries, a file each (contract A4, A5;
tests/corpus/README.md)."""

import json
import re
from pathlib import Path

import pytest

from tests.support.books import assert_books_agree
from tests.support.gateway import MODEL, Caller, Gateway

CORPUS = Path(__file__).parent / "corpus"
CASES = {
    file.parent.name: {body.stem: body.read_bytes() for body in sorted(file.parent.glob("*.json")) if body != file}
    for file in sorted(CORPUS.glob("*/headers.json"))
}
REFUSED = {
    "openai-node/surrogate-beside-noncharacter": "lone surrogates are masked by U+FDD0 and refused where the text has one of its own",
}
ALLOWED = {
    "Host", "Authorization", "Content-Type", "Accept-Encoding", "User-Agent", "X-Title", "Accept", "Content-Length",
}  # fmt: skip
NAME = re.compile(r'[\s,]*(?=")')
COLON = re.compile(r"\s*:\s*")


def members(document: str) -> dict[str, str]:
    """An object's members in their order, names and values as they are spelled."""
    end = json.JSONDecoder().raw_decode
    found: dict[str, str] = {}
    at = document.index("{") + 1
    while name := NAME.match(document, at):
        _, after_name = end(document, name.end())
        colon = COLON.match(document, after_name)
        assert colon is not None
        _, at = end(document, colon.end())
        spelled = document[name.end() : after_name]
        assert spelled not in found, f"{spelled} stands twice"
        found[spelled] = document[colon.end() : at]
    assert document[at:].strip() == "}"
    return found


def with_true(value: str | None, name: str) -> dict[str, str]:
    """The members of the object, if it is one, with `name` among them and true."""
    return {**(members(value) if value and value != "null" else {}), name: "true"}


def assert_only_ours_differs(sent: str, received: str) -> None:
    """Every member stands where it stood and is spelled as it was; ours are what they must be, and new ones come last."""
    before, after = members(sent), members(received)
    ours = {'"user"', '"usage"'}
    if before.get('"stream"') == "true":
        ours.add('"stream_options"')
        assert members(after['"stream_options"']) == with_true(before.get('"stream_options"'), '"include_usage"')
    if before.get('"model"', "null") == "null":
        ours.add('"model"')
        assert after['"model"'] == f'"{MODEL}"'
    assert list(after)[: len(before)] == list(before)
    assert set(after) == set(before) | ours
    assert [name for name in before if name not in ours and after[name] != before[name]] == []
    assert members(after['"usage"']) == with_true(before.get('"usage"'), '"include"')
    assert re.fullmatch('"[0-9a-f]{32}"', after['"user"'])
    user = json.loads(before.get('"user"', "null"))
    assert not user or user not in received


async def play(gateway: Gateway, caller: Caller, client: str, body: bytes) -> None:
    headers = json.loads((CORPUS / client / "headers.json").read_text())
    headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
    async with gateway.session.post(gateway.chat_url, data=body, headers={**headers, **caller.headers}) as response:
        document = await response.read()
    assert response.status == 200, document
    streams = json.loads(body).get("stream") is True
    assert response.content_type == ("text/event-stream" if streams else "application/json")
    *_, record = gateway.simulator.books.records.values()
    assert_only_ours_differs(body.decode(), record.body.decode())
    assert set(record.headers) <= ALLOWED
    assert (record.headers["User-Agent"], record.headers["X-Title"]) == ("GPTutor", "GPTutor")


@pytest.mark.parametrize("client", CASES)
async def test_what_a_client_sends_reaches_openrouter_as_it_is_spelled(gateway: Gateway, client: str) -> None:
    caller = await gateway.caller("10000")  # so much that no balance limits an answer
    faults = []
    for case, body in CASES[client].items():
        if f"{client}/{case}" not in REFUSED:
            try:
                await play(gateway, caller, client, body)
            except AssertionError as fault:
                faults.append(f"{client}/{case}: {fault}")
    assert not faults, "\n\n".join(faults)
    await assert_books_agree(gateway, caller, "10000")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=why)) for name, why in REFUSED.items()]
)
async def test_what_is_wrongly_refused(gateway: Gateway, name: str) -> None:
    client, case = name.split("/")
    await play(gateway, await gateway.caller(), client, CASES[client][case])


@pytest.mark.parametrize(
    "wrong", ['"model":"m","x":1,', '"x":1.0,"model":"m",', '"model":"m",', '"model":"m","x":1.0,"y":2,', '"model":"M","x":1.0,']
)
def test_the_comparison_sees_what_it_must(wrong: str) -> None:
    sent = '{"model": "m", "x": 1.0, "user": "ivan"}'
    ours = '"user":"00112233445566778899aabbccddeeff","usage":{"include":true}'
    assert_only_ours_differs(sent, f'{{"model":"m","x":1.0,{ours}}}')
    with pytest.raises(AssertionError):
        assert_only_ours_differs(sent, f"{{{wrong}{ours}}}")
