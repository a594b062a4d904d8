"""Requests of real client libraries, recorded one body per file, reach OpenRouter unchanged except for GPTutor's own fields (contract
A4, A5; tests/corpus/README.md)."""

import json
import re
from pathlib import Path

import pytest

from tests.support.accounting import assert_charges_match_bills
from tests.support.gateway import MODEL, Client, Gateway

CORPUS = Path(__file__).parent / "corpus"
CASES = {
    file.parent.name: {body.stem: body.read_bytes() for body in sorted(file.parent.glob("*.json")) if body != file}
    for file in sorted(CORPUS.glob("*/headers.json"))
}
ALLOWED_HEADERS = {
    "Host", "Authorization", "Content-Type", "Accept-Encoding", "User-Agent", "X-Title", "Accept", "Content-Length",
}  # fmt: skip
NAME = re.compile(r'[\s,]*(?=")')
COLON = re.compile(r"\s*:\s*")


def members(document: str) -> dict[str, str]:
    """The members of a JSON object in their order; names and values as their text in the document."""
    decode = json.JSONDecoder().raw_decode
    found: dict[str, str] = {}
    index = document.index("{") + 1
    while name := NAME.match(document, index):
        _, after_name = decode(document, name.end())
        colon = COLON.match(document, after_name)
        assert colon is not None
        _, index = decode(document, colon.end())
        key = document[name.end() : after_name]
        assert key not in found, f"duplicate {key}"
        found[key] = document[colon.end() : index]
    assert document[index:].strip() == "}"
    return found


def with_true(value: str | None, name: str) -> dict[str, str]:
    """The members of the object (none for null), with `name` set to true."""
    return {**(members(value) if value and value != "null" else {}), name: "true"}


def assert_only_own_fields_differ(sent: str, received: str) -> None:
    """Members keep their order and text; GPTutor's own have the required values, and new ones come last."""
    before, after = members(sent), members(received)
    own_fields = {'"user"', '"usage"'}
    if before.get('"stream"') == "true":
        own_fields.add('"stream_options"')
        assert members(after['"stream_options"']) == with_true(before.get('"stream_options"'), '"include_usage"')
    if before.get('"model"', "null") == "null":
        own_fields.add('"model"')
        assert after['"model"'] == f'"{MODEL}"'
    if after.get('"provider"') != before.get('"provider"'):  # the client chooses providers: their prices are capped
        own_fields.add('"provider"')
        chosen, capped = members(before['"provider"']), members(after['"provider"'])
        lower, cap = json.loads(chosen.pop('"max_price"', "{}")), json.loads(capped.pop('"max_price"'))
        assert chosen == capped
        assert all(0 <= float(cap[name]) <= float(lower.get(name, "inf")) for name in ("prompt", "completion", "request"))
    assert list(after)[: len(before)] == list(before)
    assert set(after) == set(before) | own_fields
    assert [name for name in before if name not in own_fields and after[name] != before[name]] == []
    assert members(after['"usage"']) == with_true(before.get('"usage"'), '"include"')
    assert re.fullmatch('"[0-9a-f]{32}"', after['"user"'])
    user = json.loads(before.get('"user"', "null"))
    assert not user or user not in received


async def send(gateway: Gateway, client: Client, sdk: str, body: bytes) -> None:
    headers = json.loads((CORPUS / sdk / "headers.json").read_text())
    headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
    async with gateway.session.post(gateway.chat_url, data=body, headers={**headers, **client.headers}) as response:
        document = await response.read()
    assert response.status == 200, document
    streams = json.loads(body).get("stream") is True
    assert response.content_type == ("text/event-stream" if streams else "application/json")
    *_, record = gateway.simulator.billing.records.values()
    assert_only_own_fields_differ(body.decode(), record.body.decode())
    assert set(record.headers) <= ALLOWED_HEADERS
    assert (record.headers["User-Agent"], record.headers["X-Title"]) == ("GPTutor", "GPTutor")


@pytest.mark.parametrize("sdk", CASES)
async def test_a_clients_request_reaches_openrouter_unchanged(gateway: Gateway, sdk: str) -> None:
    client = await gateway.client("10000")  # so much that the balance limits no response
    errors = []
    for case, body in CASES[sdk].items():
        try:
            await send(gateway, client, sdk, body)
        except AssertionError as error:
            errors.append(f"{sdk}/{case}: {error}")
    assert not errors, "\n\n".join(errors)
    await assert_charges_match_bills(gateway, client, "10000")


@pytest.mark.parametrize(
    "wrong", ['"model":"m","x":1,', '"x":1.0,"model":"m",', '"model":"m",', '"model":"m","x":1.0,"y":2,', '"model":"M","x":1.0,']
)
def test_the_comparison_detects_differences(wrong: str) -> None:
    sent = '{"model": "m", "x": 1.0, "user": "ivan"}'
    ours = '"user":"00112233445566778899aabbccddeeff","usage":{"include":true}'
    assert_only_own_fields_differ(sent, f'{{"model":"m","x":1.0,{ours}}}')
    with pytest.raises(AssertionError):
        assert_only_own_fields_differ(sent, f"{{{wrong}{ours}}}")
