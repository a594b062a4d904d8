"""What the log tells about a refused request: its cause, the client's address, the public part of its key (contract F1, F2), and
what its id tells (contract A7)."""

import itertools
import logging
import os
import time
import uuid
from email.utils import formatdate
from typing import Any

import pytest
from aiohttp import web

from gptutor.http.request_ids import BATCH, new_request_id
from gptutor.money.keys import display_prefix, make_key
from gptutor.money.users import UserRepository
from gptutor.openrouter.clock import ClockSkew
from tests.support.gateway import Gateway
from tests.support.vk import VK, bearer, launch, send, sign_in

BEHIND_A_PROXY = {"X-Forwarded-For": "198.51.100.7, 203.0.113.9"}
"""203.0.113.9 is what the trusted proxy saw; the rest is the client's own invention."""


def refusals(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record for record in caplog.records if hasattr(record, "cause") and hasattr(record, "address")]


@pytest.mark.parametrize("tuned", [VK])
async def test_each_reason_of_a_rejected_sign_in_has_its_cause_in_the_log(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gptutor")
    user = await sign_in(gateway, launch(7))
    await UserRepository(gateway.database).set_active(user["dbUser"]["id"], False)
    for headers in (
        {},
        {"Authorization": "Basic eA=="},
        bearer(launch(sign="x" * 43)),
        bearer(launch(vk_ts=int(time.time()) - 4000)),
        bearer(launch(vk_app_id=1)),
        bearer(launch(7)),
    ):
        assert (await send(gateway, "GET", "/vk-test", {**headers, **BEHIND_A_PROXY}))[0] == 401
    lines = refusals(caplog)
    assert [line.cause for line in lines] == [
        "there is no Authorization header",
        "the Authorization header does not have the form Bearer <key>",
        "VK: the signature is wrong",
        "VK: vk_ts is too old or in the future",
        "VK: the launch is of another app",
        "the user is inactive",
    ]
    assert {(line.code, line.status, line.address, line.key) for line in lines} == {("invalid_key", 401, "203.0.113.9", None)}


@pytest.mark.parametrize("tuned", [{"rate_limit": {"models_per_minute": 1}}])
async def test_a_refused_completion_names_its_cause_its_address_and_the_public_part_of_its_key(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gptutor")
    poor = await gateway.client("0")
    unknown, typo = make_key(poor.account_id), f"{poor.key[:-1]}{'a' if poor.key[-1] != 'a' else 'b'}"
    for key in (unknown, typo, "sk-user-nonsense", poor.key):
        headers = {**bearer(key), **BEHIND_A_PROXY}
        body = {"messages": [{"role": "user", "content": "x"}]}
        async with gateway.session.post(gateway.chat_url, json=body, headers=headers) as response:
            assert response.status in (401, 402)
    await gateway.idle()
    for _ in range(2):
        async with gateway.session.get(gateway.url + "/v1/models", headers=BEHIND_A_PROXY) as response:
            await response.read()
    assert [(line.cause, line.key) for line in refusals(caplog)] == [
        ("the key is unknown, revoked or expired, or its user is inactive", display_prefix(unknown)),
        ("the key is not one of ours, or has a typo", display_prefix(poor.key)),
        ("the key is not one of ours, or has a typo", None),
        ("Insufficient balance", display_prefix(poor.key)),
        ("rate_limit.models_per_minute", None),
    ]
    assert {line.address for line in refusals(caplog)} == {"203.0.113.9"}
    everything = "".join(str(record.__dict__) for record in caplog.records)
    for key in (unknown, poor.key):
        assert key[len(display_prefix(key)) :] not in everything


async def test_a_key_that_a_client_puts_elsewhere_is_not_in_the_cause(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gptutor")
    client = await gateway.client()
    model = f"x/{client.key}"
    async with gateway.session.post(
        gateway.chat_url, json={"model": model, "messages": [{"role": "user", "content": "x"}]}, headers=client.headers
    ) as response:
        assert (response.status, response.headers["X-Error-Code"]) == (400, "model_not_found")
    (line,) = refusals(caplog)
    assert line.cause == "x/sk-… is not a model of OpenRouter's; GET /v1/models lists them"
    assert line.address is None  # the machine itself, which is a trusted proxy


@pytest.mark.parametrize("status", [401, 402])
async def test_the_line_about_our_account_has_request_id_status_and_type(
    scripted: Any, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    plays, gateway = scripted

    async def refuse(request: web.Request) -> web.Response:
        return web.json_response({"error": {"code": status, "message": "No"}}, status=status)

    plays.append(refuse)
    client = await gateway.client()
    response, _ = await gateway.chat(client)
    assert response.status == 500
    (line,) = [record.__dict__ for record in caplog.records if record.levelno == logging.ERROR]
    assert (line["type"], line["requestId"], line["status"]) == ("upstream_account", response.headers["X-Request-ID"], status)


def test_a_wrong_clock_is_one_warning_while_it_lasts(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = ClockSkew(), 1e9
    monkeypatch.setattr("gptutor.openrouter.clock.time.time", lambda: now)
    for ahead_s in (0, 50, -100, -100, -61, -50, -100, 0, 0, 90):
        clock.observe(formatdate(now - ahead_s, usegmt=True))
    clock.observe(None)
    clock.observe("yesterday")
    assert [record.getMessage().partition(" OpenRouter's")[0].rpartition("machine ")[2] for record in caplog.records] == [
        "is 100 s behind", "agrees with", "is 90 s ahead of",
    ]  # fmt: skip


# -- X-Request-ID


def test_request_ids_are_random_uuids_and_no_counter() -> None:
    ids = [uuid.UUID(new_request_id()) for _ in range(3 * BATCH)]
    assert len(set(ids)) == len(ids)
    assert {(each.version, each.variant) for each in ids} == {(4, uuid.RFC_4122)}
    for first, second in itertools.pairwise(ids):
        assert (first.int ^ second.int).bit_count() > 20  # of 122 random bits, of which half differ


def test_a_forked_process_gives_out_other_ids() -> None:
    new_request_id()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, new_request_id().encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100).decode() != new_request_id()
    os.close(reader)
    os.close(writer)
