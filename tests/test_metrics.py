"""Prometheus metrics (contract F11, B6)."""

import datetime
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import REGISTRY

from gptutor.openrouter.service import UpstreamLimits, connected
from gptutor.telemetry.metrics import CLOCK_SKEW, build_metrics
from tests.support.gateway import Gateway
from tests.support.service import start

PAGES = sorted((Path(__file__).parent.parent / "gptutor" / "web" / "pages").glob("monitoring.*.md"))


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_completions_errors_failures_and_retries_are_counted(gateway: Gateway) -> None:
    client = await gateway.client()
    counted = [
        ("gptutor_completions_total", {"outcome": "settled"}),
        ("gptutor_completions_total", {"outcome": "upstream_account"}),
        ("gptutor_errors_total", {"code": "upstream_account"}),
        ("gptutor_upstream_account_errors_total", {"status": "402"}),
        ("gptutor_upstream_failures_total", {"kind": "status", "status": "402"}),
        ("gptutor_upstream_failures_total", {"kind": "status", "status": "503"}),
        ("gptutor_upstream_retries_total", {}),
        ("gptutor_completion_duration_seconds_count", {}),
    ]
    before = [value(name, **labels) for name, labels in counted]
    await gateway.chat(client)
    await gateway.chat(client, "fault:status=402")
    await gateway.chat(client, "fault:status=503:0")
    after = [value(name, **labels) for name, labels in counted]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1, 1, 1, 1, 3, 2, 3]
    assert value("gptutor_catalogue_age_seconds") > 0


@pytest.mark.parametrize(("date", "skew"), [("Tue, 24 Nov 2026 10:00:00 GMT", 3600), ("nonsense", 0)])
async def test_clock_skew_is_measured_against_openrouter(
    aiohttp_server: Any, monkeypatch: pytest.MonkeyPatch, date: str, skew: float
) -> None:
    """Row operator-10: by the Date header of OpenRouter's responses."""

    async def models(request: web.Request) -> web.Response:
        return web.Response(body=b"{}", headers={"Date": date})

    upstream = web.Application()
    upstream.router.add_get("/models", models)
    server = await aiohttp_server(upstream)
    limits = UpstreamLimits(connect_s=5, total_s=5, first_byte_s=5, idle_s=5, end_s=5, attempts_max=1)
    noon = datetime.datetime(2026, 11, 24, 11, tzinfo=datetime.UTC).timestamp()
    monkeypatch.setattr("gptutor.openrouter.clock.time.time", lambda: noon)
    CLOCK_SKEW.set(0)
    async with connected(str(server.make_url("")), "x", limits, referer="", title="", connections_max=1) as service:
        await service.models()
    assert value("gptutor_clock_skew_seconds") == skew


async def test_the_public_listener_does_not_serve_metrics(gateway: Gateway) -> None:
    async with gateway.session.get(f"{gateway.url}/metrics") as response:
        assert response.status == 404


async def test_metrics_are_served_on_their_own_listener(tmp_path: Path, unused_tcp_port: int) -> None:
    service = start(tmp_path, GPTUTOR_METRICS__PORT=str(unused_tcp_port))
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{unused_tcp_port}/metrics") as response:
        text = await response.text()
    assert service.stop() == 0
    assert response.content_type == "text/plain"
    assert "gptutor_in_flight_requests 0.0" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_metric_is_documented(page: Path) -> None:
    assert build_metrics()
    ours = {metric.name for metric in REGISTRY.collect() if metric.name.startswith("gptutor_")}
    assert len(ours) >= 11
    assert set(re.findall(r"^\| `(gptutor_\w+?)(?:_total)?(?:\{\w+(?:, \w+)?\})?` \|", page.read_text(), re.MULTILINE)) == ours
