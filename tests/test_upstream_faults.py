"""Whatever OpenRouter does, the client gets a true response and the invariants hold (contract A3, B6, B7, C5 to C8; rows money-9 to -11,
upstream-2, -6, -9 to -18, sum-5)."""

import asyncio
import gzip
import json
from typing import Any

import pytest
from aiohttp import web

from gptutor.api.chat.exchange import TRUNCATED_EVENT
from gptutor.http.app_keys import JOURNAL
from gptutor.openrouter.errors import REFUSALS
from gptutor.simulator.response_script import OPERATOR
from tests.support.accounting import assert_charges_match_bills
from tests.support.gateway import Gateway

WHOLE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("fault", "ending"),
    [
        ("usage-twice", WHOLE),
        ("usage-early", WHOLE),
        ("usage-in-finish", WHOLE),
        ("usage-alone", WHOLE),
        ("injected", WHOLE),
        ("comments=3", WHOLE),
        ("big-line=20000000", WHOLE),
        ("odd-headers", WHOLE),
        ("byok", WHOLE),
        ("one-write", WHOLE),
        ("error=4", b"}\n\n"),
        ("string-code=4", b"}\n\n"),
        ("bad-chunk=5", TRUNCATED_EVENT),
        ("cut-inside=5", TRUNCATED_EVENT),
        ("usage-hang", TRUNCATED_EVENT),
    ],
)
@pytest.mark.parametrize("tuned", [{"openrouter": {"end_s": 0.3}}])
async def test_a_faulty_stream_ends_as_it_should_and_is_charged_exactly(gateway: Gateway, fault: str, ending: bytes) -> None:
    client = await gateway.client()
    gateway.simulator.word_s = 0.001  # so that the fault occurs in mid-stream
    response, stream = await gateway.chat(client, f"fault:{fault}", stream=True)
    assert response.status == 200
    assert stream.endswith(ending)
    assert (WHOLE in stream) is (ending == WHOLE)
    assert (TRUNCATED_EVENT in stream) is (ending == TRUNCATED_EVENT)
    assert not {"Set-Cookie", "X-Evil", "Server-Timing"} & set(response.headers)
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("plain-error", 200, None),
        ("top-error", 200, None),
        ("odd-headers", 200, None),
        ("byok", 200, None),
        ("injected", 200, None),
        ("no-code", 429, "rate_limited_upstream"),
        ("redirect=302", 500, "upstream_error"),
        ("redirect=308", 500, "upstream_error"),
        ("bad-length", 500, "upstream_outcome_unknown"),
    ],
)
async def test_a_faulty_plain_response_has_its_error_and_is_charged_exactly(
    gateway: Gateway, fault: str, status: int, code: str | None
) -> None:
    client = await gateway.client()
    response, document = await gateway.chat(client, f"fault:{fault}")
    assert (response.status, response.headers.get("X-Error-Code")) == (status, code)
    assert json.loads(document)
    assert not {"Set-Cookie", "X-Evil", "Location"} & set(response.headers)
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_body_that_is_compressed_against_our_request_passes_unchanged_and_is_charged(
    gateway: Gateway, stream: bool
) -> None:
    client = await gateway.client()
    response, document = await gateway.chat(client, "fault:gzip", stream=stream)
    assert response.headers["Content-Encoding"] == "gzip"
    assert (b"[DONE]" in gzip.decompress(document)) is stream
    await assert_charges_match_bills(gateway, client)


async def test_a_stream_of_single_bytes_passes_and_is_charged(gateway: Gateway) -> None:
    client = await gateway.client()
    _, stream = await gateway.chat(client, "fault:drip=1", stream=True, max_tokens=5)
    assert stream.endswith(WHOLE)
    await assert_charges_match_bills(gateway, client)


@pytest.mark.parametrize("status", [400, 404, 413, 422])
async def test_openrouters_error_message_reaches_the_client_in_either_form(scripted: Any, status: int) -> None:
    plays, gateway = scripted
    client = await gateway.client()
    for body, text in (
        (b'{"error":{"message":"too long","code":400}}', "too long"),
        (b'{"error":{"message":"too long","error_type":"x","http_status":400}}', "too long"),
        (b'{"error":"too long"}', "too long"),
        (b'{"error":{"message":null}}', "OpenRouter rejected the request"),
        (b"{}", "OpenRouter rejected the request"),
        (b"<html>", "OpenRouter rejected the request"),
        (b"", "OpenRouter rejected the request"),
        (b'{"error":{"message":"%s"}}' % (b"x" * 5000), "x" * 1000),
    ):
        plays.append(answering(status, body))
        response, document = await gateway.chat(client)
        assert (response.status, response.headers["X-Error-Code"]) == (400, "upstream_rejected")
        assert json.loads(document) == {"error": text}
    assert await client.held() == 0
    assert await client.balance() == 100


def answering(status: int, body: bytes, **headers: str) -> Any:
    async def play(request: web.Request) -> web.Response:
        return web.Response(status=status, body=body, content_type="application/json", headers=headers)

    return play


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tuned", [{"openrouter": {"attempts_max": 2}}])
async def test_a_refusal_with_a_generation_id_bought_nothing(gateway: Gateway, stream: bool) -> None:
    """Row sum-5: the hold is released at once, and the client may try again, unless our own account is the trouble; the operator's
    id at OpenRouter is not passed on."""
    client = await gateway.client()
    for status in sorted(REFUSALS):
        response, document = await gateway.chat(client, f"fault:status={status}:0", stream=stream)
        assert response.status >= 400
        assert OPERATOR.encode() not in document
        assert await client.held() == 0
        assert ("x-should-retry" in response.headers) is (response.headers["X-Error-Code"] == "upstream_account")
    assert await client.balance() == 100
    assert await gateway.database.fetch("list_waiting_holds", 1000) == []


@pytest.mark.parametrize("tuned", [{"openrouter": {"attempts_max": 3}}])
async def test_a_refusal_with_a_generation_id_is_retried(scripted: Any) -> None:
    plays, gateway = scripted
    statuses = iter([429, 503, 200])
    bought = b'{"id":"gen-3","choices":[],"usage":{"cost":0.001}}'

    async def play(request: web.Request) -> web.StreamResponse:
        status = next(statuses)
        body = b'{"error":{"code":%d,"message":"later"}}' % status if status != 200 else bought
        headers = {"X-Generation-Id": f"gen-{status}", "Retry-After": "0"}
        return web.Response(status=status, body=body, content_type="application/json", headers=headers)

    plays.append(play)
    client = await gateway.client()
    response, document = await gateway.chat(client)
    assert (response.status, document) == (200, bought)
    assert await client.held() == 0
    assert str(await client.balance()) == "99.91"


@pytest.mark.parametrize("tuned", [{"openrouter": {"attempts_max": 2, "total_s": 30}}])
async def test_while_a_refused_request_waits_for_its_retry_the_journal_says_that_nothing_was_bought(scripted: Any) -> None:
    """Row sum-5: if the process dies then, recovery releases the hold, and looks nothing up."""
    plays, gateway = scripted
    refusal = b'{"error":{"code":429,"message":"later"}}'
    plays.append(answering(429, refusal, **{"X-Generation-Id": "gen-1", "Retry-After": "1"}))
    client = await gateway.client()
    waiting = asyncio.create_task(gateway.chat(client))
    journal, seen = gateway.app[JOURNAL], set()
    while not waiting.done():
        seen.add(tuple(record.generation_id for record in journal.open_holds.values()))
        await asyncio.sleep(0.01)
    assert (await waiting)[0].status == 429
    assert () in seen
    assert ("gen-1",) not in seen
    assert await client.held() == 0


@pytest.mark.parametrize("status", [400, 429, 503])
@pytest.mark.parametrize("body", [b"<html>", b'{"error":"text"}', b"{}"])
async def test_an_error_in_another_form_with_a_generation_id_may_have_bought_something(
    scripted: Any, status: int, body: bytes
) -> None:
    plays, gateway = scripted
    plays.append(answering(status, body, **{"X-Generation-Id": "gen-1"}))
    client = await gateway.client()
    response, _ = await gateway.chat(client)
    assert response.headers["x-should-retry"] == "false"
    assert await client.held() > 0


@pytest.mark.parametrize("body", [b"<html>", b"", b"{}", b'{"message":"edge"}', b'{"error":null}'])
async def test_an_error_page_of_the_edge_proves_nothing_in_any_form(scripted: Any, body: bytes) -> None:
    plays, gateway = scripted
    plays.append(answering(502, body))
    client = await gateway.client()
    response, _ = await gateway.chat(client)
    assert (response.status, response.headers["X-Error-Code"]) == (500, "upstream_outcome_unknown")
    assert await client.held() > 0
