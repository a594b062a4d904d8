"""Whatever clients send, however many at once, through several processes: no account falls below zero by more than the setting.

OpenRouter bills every request as dearly as it can (`gptutor.simulator.worst_case`). Two gateways share one database, and each kind
of request comes many times at once, to accounts with different balances.

`EXPOSURE_REQUESTS=220 make test T="tests/abuse/test_exposure.py -s"` sends more of each kind, to more accounts, and prints a table.
"""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gptutor.config import schema
from gptutor.database import pool
from gptutor.server.serve import simulated_openrouter
from gptutor.simulator.server import Simulator
from gptutor.telemetry.metrics import CHARGE_OVERRUNS
from tests.support.gateway import Gateway, config_for, gateway_on
from tests.support.ledger import assert_invariants_hold

LITE = "google/gemini-2.5-flash-lite"
CHEAP = "meta-llama/llama-3.1-8b-instruct"
SEARCH = {"type": "openrouter:web_search"}
FILE = [
    {"type": "text", "text": "Read it"},
    {"type": "file", "file": {"filename": "a.pdf", "file_data": "https://example.org/a.pdf"}},
]
IMAGE = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]
AUDIO = [{"type": "input_audio", "input_audio": {"data": "A" * 3000, "format": "mp3"}}]

KINDS: dict[str, dict[str, Any]] = {
    "no max_tokens": {"model": LITE},
    "max_tokens": {"model": LITE, "max_tokens": 60_000},
    "n": {"model": "openai/gpt-4o-mini", "n": 8},
    "stream": {"model": LITE, "stream": True},
    "long prompt": {"model": "anthropic/claude-sonnet-4.5", "text": "ы" * 20_000, "max_tokens": 16},
    "images only, 0/0": {"model": "black-forest-labs/flux.2-pro"},
    "images, no price": {"model": "bytedance-seed/seedream-4.5", "max_tokens": 1},
    "images and text": {"model": "google/gemini-2.5-flash-image", "max_tokens": 1},
    "audio output": {"model": "openai/gpt-4o-audio-preview", "max_tokens": 1},
    "audio input": {"model": "google/gemini-2.5-pro", "max_tokens": 16, "content": AUDIO},
    "music": {"model": "google/lyria-3-pro-preview", "max_tokens": 1},
    "image input": {"model": "openai/gpt-4o-mini", "max_tokens": 16, "content": IMAGE},
    "file by URL": {"model": LITE, "max_tokens": 16, "content": FILE},
    "OCR": {"model": LITE, "max_tokens": 16, "content": FILE, "plugins": [{"id": "file-parser", "pdf": {"engine": "mistral-ocr"}}]},
    "OCR, unasked": {"model": CHEAP, "max_tokens": 16, "content": FILE},
    "own searches": {"model": "perplexity/sonar", "max_tokens": 1},
    "deep research": {"model": "perplexity/sonar-deep-research", "max_tokens": 1},
    "web plugin": {"model": LITE, "max_tokens": 16, "plugins": [{"id": "web", "max_results": 20}]},
    ":online": {"model": f"{LITE}:online"},
    "server tool": {"model": LITE, "max_tokens": 100, "tools": [SEARCH]},
    "server tool, steps": {
        "model": LITE, "tools": [SEARCH, SEARCH], "stop_server_tools_when": [{"type": "step_count_is", "step_count": 2}],
    },
    "router": {"model": "openrouter/auto"},
    "router, long prompt": {"model": "openrouter/auto", "text": "x" * 50_000, "max_tokens": 16},
    "fallback to a router": {"models": [CHEAP, "openrouter/auto"], "model": CHEAP, "text": "fault:primary-down"},
    "provider.order": {"model": CHEAP, "provider": {"order": ["azure"], "max_price": {"prompt": 100, "completion": 900}}},
    "provider.sort": {"model": "anthropic/claude-sonnet-4.5", "provider": {"sort": "throughput"}, "max_tokens": 100},
    ":nitro": {"model": f"{CHEAP}:nitro"},
    "reasoning": {"model": LITE, "max_tokens": 16, "reasoning": {"max_tokens": 30_000}},
    "reasoning, no limit": {"model": LITE, "reasoning": {"max_tokens": 2000}},
    "prediction": {"model": LITE, "max_tokens": 16, "prediction": {"type": "content", "content": "x" * 30_000}},
    "priority": {"model": "openai/gpt-4o-mini", "service_tier": "priority"},
    "cache for an hour": {
        "model": "anthropic/claude-sonnet-4.5", "text": "x" * 5000, "max_tokens": 16, "cache_control": {"type": "ephemeral", "ttl": "1h"},
    },
}  # fmt: skip
REQUESTS = int(os.environ.get("EXPOSURE_REQUESTS", "0"))
BALANCES = ("1.05", "33", "2001") if REQUESTS else ("10", "310")
"""Of the accounts of each kind."""


@pytest.fixture
async def gateways(
    database_url: str, database: pool.Database, simulator: Simulator, tmp_path: Path
) -> AsyncIterator[tuple[Gateway, Gateway]]:
    simulator.bills_worst_case = True
    simulator.first_word_s = 3.0 if REQUESTS else 0.3  # nothing is settled before the last request of a kind has come
    tuned = {"rate_limit": {"chat_per_minute": 0, "chat_concurrent_max": 0, "refused_per_minute": 0}}
    async with simulated_openrouter(simulator, schema.SimulatorSettings(port=0)) as base_url:
        first, second = (config_for(database_url, base_url, tmp_path / name, tuned) for name in ("first", "second"))
        async with gateway_on(first, database, simulator) as one, gateway_on(second, database, simulator) as other:
            yield one, other


def body_of(kind: str) -> dict[str, Any]:
    members = dict(KINDS[kind])
    content = members.pop("content", None) or members.pop("text", "Hello")
    return {"messages": [{"role": "user", "content": content}], **members}


async def flood(gateways: tuple[Gateway, Gateway], kind: str, balance: str) -> tuple[Counter[int], Decimal, Decimal]:
    """The statuses of the responses, and what the account had and was charged."""
    client, body = await gateways[0].client(balance), body_of(kind)

    async def send(number: int) -> int:
        gateway = gateways[number % 2]
        async with gateway.session.post(gateway.chat_url, json=body, headers=client.headers) as response:
            await response.read()
            return response.status

    statuses = Counter(await asyncio.gather(*(send(number) for number in range(REQUESTS or 12))))
    for gateway in gateways:
        await gateway.idle()
    assert await client.held() == 0
    return statuses, await client.balance(), Decimal(balance)


async def test_no_kind_of_request_takes_a_balance_below_the_setting(gateways: tuple[Gateway, Gateway]) -> None:
    """Row sum-1."""
    worst, served, overruns = {}, {}, CHARGE_OVERRUNS._value.get()
    for kind in KINDS:
        results = await asyncio.gather(*(flood(gateways, kind, balance) for balance in BALANCES))
        worst[kind] = min(balance for _, balance, _ in results)
        served[kind] = [statuses[200] for statuses, _, _ in results]
        others = {status for statuses, _, _ in results for status in statuses} - {
            200,
            402,
            429,
            503,
        }  # and too many bytes at once
        columns = ", ".join(
            f"{count} of {REQUESTS or 12} with {had}" for count, (_, _, had) in zip(served[kind], results, strict=True)
        )
        print(f"| {kind} | {worst[kind]:.2f} | {columns} | {others or ''} |", flush=True)
        assert not others, kind
    assert {kind for kind, counts in served.items() if not any(counts)} == set()
    assert min(worst.values()) >= -schema.BillingSettings().overdraft_max_rub, worst
    assert CHARGE_OVERRUNS._value.get() == overruns
    await assert_invariants_hold(gateways[0].database)


async def test_many_short_requests_run_at_once_on_ten_roubles(gateways: tuple[Gateway, Gateway]) -> None:
    """How many, the limits page says."""
    gateways[0].simulator.first_word_s = 1.5
    one = gateways[0]
    counts = {}
    kinds: dict[str, dict[str, Any]] = {"no limit": {}, "max_tokens": {"max_tokens": 200}}
    for name, members in kinds.items():
        client = await one.client("10")
        replies = await asyncio.gather(*(one.chat(client, model=LITE, **members) for _ in range(110)))
        counts[name] = [response.status for response, _ in replies].count(200)
    print(counts)
    assert counts["no limit"] >= 16
    assert counts["max_tokens"] >= 90
