"""A charge above its hold is booked in full, counted and logged (contract C5)."""

import logging
from decimal import Decimal
from typing import Any

import pytest
from aiohttp import web

from gptutor.telemetry.metrics import CHARGE_OVERRUNS
from tests.support.ledger import assert_invariants_hold


def overruns() -> float:
    return float(CHARGE_OVERRUNS._value.get())


@pytest.mark.parametrize(
    ("cost_usd", "level"),
    [
        (0.001, None),  # 9 kopecks: as much as is held
        (0.01, "WARNING"),  # 90 kopecks for a hold of 10
        (0.1, "ERROR"),  # 9 roubles: more than a balance may fall below zero
    ],
)
async def test_a_charge_above_its_hold_is_booked_counted_and_logged(
    scripted: Any, caplog: Any, cost_usd: float, level: str | None
) -> None:
    plays, gateway = scripted

    async def play(_: web.Request) -> web.Response:
        return web.json_response({"id": "gen-1", "choices": [], "usage": {"cost": cost_usd}})

    plays.append(play)
    client = await gateway.client("5")
    before = overruns()
    with caplog.at_level(logging.WARNING, "gptutor.overruns"):
        response, _ = await gateway.chat(client, max_tokens=100)
    assert response.status == 200
    assert await client.balance() == 5 - Decimal(str(cost_usd)) * 90
    assert overruns() - before == (level is not None)
    lines = [record for record in caplog.records if record.name == "gptutor.overruns"]
    assert [record.levelname for record in lines] == ([level] if level else [])
    for record in lines:
        assert (record.type, record.requestId) == ("overrun", response.headers["X-Request-ID"])
        assert (Decimal(record.holdRub), Decimal(record.costRub)) == (Decimal("0.1"), Decimal(str(cost_usd)) * 90)
    await assert_invariants_hold(gateway.database)


async def test_an_account_in_debt_is_refused(scripted: Any) -> None:
    plays, gateway = scripted

    async def play(_: web.Request) -> web.Response:
        return web.json_response({"id": "gen-1", "choices": [], "usage": {"cost": 0.1}})

    plays.append(play)
    client = await gateway.client("5")
    await gateway.chat(client, max_tokens=100)
    assert await client.balance() == -4
    assert (await gateway.chat(client, max_tokens=100))[0].status == 402
