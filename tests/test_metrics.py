"""Prometheus metrics (contract F11, B6): what is counted, under which labels, and what the page looks like."""

import asyncio
import datetime
import re
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from gptutor.errors import ERRORS
from gptutor.http.app_keys import SERVICES
from gptutor.money.bookings import Bookings
from gptutor.openrouter.service import UpstreamLimits, connected
from gptutor.telemetry import event_loop, metrics, model_labels
from gptutor.telemetry.event_loop import LoopLag
from gptutor.telemetry.metrics import CLOCK_SKEW
from gptutor.telemetry.model_labels import ModelLabels
from gptutor.telemetry.revision import revision
from gptutor.telemetry.shared_metrics import own_text
from tests.support.gateway import MODEL, Gateway
from tests.support.service import start

PAGES = sorted((Path(__file__).parent.parent / "gptutor" / "web" / "pages").glob("monitoring.*.md"))


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def labels_of(family: str, label: str) -> set[str]:
    return {sample.labels[label] for metric in REGISTRY.collect() if metric.name == family for sample in metric.samples}


async def test_completions_errors_failures_and_retries_are_counted(gateway: Gateway) -> None:
    client = await gateway.client()
    settled = {"family": "google", "stream": "false", "outcome": "settled"}
    counted = {
        "gptutor_completions_total": ({"outcome": "settled"}, 1),
        "gptutor_errors_total": ({"code": "upstream_account"}, 1),
        "gptutor_upstream_account_errors_total": ({"status": "402"}, 1),
        "gptutor_upstream_failures_total": ({"kind": "status", "status": "503"}, 3),
        "gptutor_upstream_retries_total": ({}, 2),
        "gptutor_completion_duration_seconds_count": (settled, 1),
        "gptutor_first_byte_seconds_count": ({**settled, "outcome": "failed"}, 2),
        "gptutor_overhead_seconds_count": ({}, 3),
        "gptutor_upstream_first_byte_seconds_count": ({"family": "google"}, 1),
        "gptutor_settle_seconds_count": ({}, 3),
        "gptutor_http_requests_total": ({"route": "/v1/chat/completions", "status": "500"}, 2),
    }
    before = {name: value(name, **labels) for name, (labels, _) in counted.items()}
    statements = value("gptutor_statement_seconds_count", statement="settle_and_hold")
    await gateway.chat(client)
    await gateway.chat(client, "fault:status=402")
    await gateway.chat(client, "fault:status=503:0")
    after = {name: value(name, **labels) for name, (labels, _) in counted.items()}
    assert {name: after[name] - before[name] for name in counted} == {name: count for name, (_, count) in counted.items()}
    assert value("gptutor_statement_seconds_count", statement="settle_and_hold") >= statements + 4
    assert value("gptutor_batch_items_count") > 0
    assert value("gptutor_pool_wait_seconds_count") > 0
    assert value("gptutor_catalogue_age_seconds") > 0
    assert value("gptutor_journal_bytes") > 0
    assert 0 < value("gptutor_journal_filled_ratio") < 0.01


async def test_the_time_to_the_first_byte_is_shorter_than_the_stream(gateway: Gateway) -> None:
    labels = {"family": "google", "stream": "true", "outcome": "settled"}
    names = ("gptutor_first_byte_seconds_sum", "gptutor_completion_duration_seconds_sum")
    before = [value(name, **labels) for name in names]
    await gateway.chat(await gateway.client(), "fault:slow=0.3", stream=True)
    first_byte, duration = (value(name, **labels) - then for name, then in zip(names, before, strict=True))
    assert 0 < first_byte < duration


async def test_tokens_dollars_and_roubles_are_those_that_were_charged(gateway: Gateway) -> None:
    names = [
        ("gptutor_tokens_total", {"model": MODEL, "direction": "in"}),
        ("gptutor_tokens_total", {"model": MODEL, "direction": "out"}),
        ("gptutor_cost_dollars_total", {"model": MODEL}),
        ("gptutor_charges_roubles_total", {"model": MODEL}),
    ]
    before = [value(name, **labels) for name, labels in names]
    topped_up = value("gptutor_bookings_roubles_total", kind="topup", direction="to")
    client = await gateway.client("100")
    _, document = await gateway.chat(client)
    usage = orjson.loads(document)["usage"]
    rows = [value(name, **labels) - then for (name, labels), then in zip(names, before, strict=True)]
    assert rows[:2] == [usage["prompt_tokens"], usage["completion_tokens"]]
    assert rows[2] == pytest.approx(float(gateway.billed_usd()))
    assert rows[3] == pytest.approx(100 - float(await client.balance()))
    assert value("gptutor_bookings_roubles_total", kind="topup", direction="to") == topped_up + 100


async def test_a_correction_that_takes_money_is_counted_apart(gateway: Gateway) -> None:
    client = await gateway.client("100")
    before = value("gptutor_bookings_roubles_total", kind="adjustment", direction="from")
    await Bookings(gateway.database).book(client.account_id, "adjustment", -3_000_000_000, reason="x")  # type: ignore[arg-type]
    assert value("gptutor_bookings_roubles_total", kind="adjustment", direction="from") == before + 3


async def test_the_end_of_a_client_that_goes_is_counted(gateway: Gateway) -> None:
    client = await gateway.client()
    labels = {"route": "/v1/chat/completions", "status": "disconnected"}
    before = value("gptutor_http_requests_total", **labels)
    going = asyncio.create_task(gateway.chat(client, "fault:slow=1"))
    async with asyncio.timeout(20):
        while not gateway.app[SERVICES].in_flight:
            await asyncio.sleep(0.001)
        going.cancel()
        while value("gptutor_http_requests_total", **labels) == before:
            await asyncio.sleep(0.01)


# -- labels


async def test_no_name_that_a_client_chooses_is_a_label(gateway: Gateway) -> None:
    client = await gateway.client()
    for number in range(3):
        await gateway.chat(client, model=f"@preset/evil-{number}")
        await gateway.chat(client, model=f"evil-{number}/gpt")
        async with gateway.session.get(f"{gateway.url}/evil-{number}") as response:
            assert response.status == 404
        async with gateway.session.get(f"{gateway.url}/v1/models/evil/{number}") as response:
            assert response.status == 404
    page = own_text().decode()
    assert "evil" not in page
    assert value("gptutor_completion_duration_seconds_count", family="other", stream="false", outcome="refused") >= 3


def test_models_that_are_not_listed_are_other_and_the_list_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_labels, "MODELS_MAX", 30)
    monkeypatch.setattr(model_labels, "FAMILIES_MAX", 20)
    monkeypatch.setattr(model_labels, "_begin", lambda _: None)
    labels = ModelLabels()
    labels.learn({"google/a": "google/a", "google/a-2026": "google/a"})
    assert [labels.model(name) for name in ("google/a", "google/a-2026", "google/a:nitro", "google/b", "")] == [
        "google/a",
        "google/a",
        "google/a",
        "other",
        "other",
    ]
    assert (labels.family("google/a:free"), labels.family("google/b")) == ("google", "other")
    for number in range(100):
        labels.learn({f"author-{number}/m": f"author-{number}/m"})
    names = [f"author-{number}/m" for number in range(100)]
    assert len({labels.model(name) for name in names}) == 30  # with `other`
    assert len({labels.family(name) for name in names}) == 20
    assert labels.model("google/a") == "google/a"


def test_every_labelled_counter_is_present_from_the_start() -> None:
    """Checked on the page of a service that has served nothing: `test_the_page_of_a_new_service`. Here: which values there are."""
    assert labels_of("gptutor_completions", "outcome") >= {"settled", "released", "awaiting_evidence", *ERRORS}
    assert labels_of("gptutor_errors", "code") >= set(ERRORS)
    assert labels_of("gptutor_upstream_failures", "status") >= {"", "other", "429", "502"}
    assert [metrics.status_label(status) for status in (0, 429, 599)] == ["", "429", "other"]


async def test_the_page_of_a_new_service(tmp_path: Path, unused_tcp_port: int) -> None:
    service = start(tmp_path, GPTUTOR_METRICS__PORT=str(unused_tcp_port))
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{unused_tcp_port}/metrics") as response:
        text = await response.text()
    assert service.stop() == 0
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) >= {metric.name for metric in REGISTRY.collect() if metric.name.startswith("gptutor_")}
    counters = [family for name, family in families.items() if name.startswith("gptutor_") and family.type == "counter"]
    assert len(counters) > 20
    assert [family.name for family in counters if not family.samples] == []
    counted = {sample.name for family in counters for sample in family.samples if sample.value}
    assert counted <= {"gptutor_process_starts_total", "gptutor_bookings_roubles_total"}  # the demo user's bonus
    for sample in (
        f'gptutor_tokens_total{{model="{MODEL}",direction="in"}} 0.0',
        'gptutor_http_requests_total{route="/v1/models/{model_id}",status="503"} 0.0',
        'gptutor_processes{state="answering"} 1.0',
        "gptutor_in_flight_requests 0.0",
        "gptutor_process_starts_total 1.0",
    ):
        assert sample in text.splitlines()
    assert families["gptutor_build_info"].samples[0].labels["commit"] == revision()


def test_the_event_loop_that_comes_late_is_seen_while_it_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_loop, "TICK_S", 0.01)
    lag, seen = LoopLag(), []

    async def block() -> None:
        with lag.measured():
            await asyncio.sleep(0.05)
            other = threading.Timer(0.3, lambda: seen.append(value("gptutor_event_loop_lag_seconds")))
            other.start()
            time.sleep(0.6)  # noqa: ASYNC251 - that is the fault
            other.join()
            await asyncio.sleep(0.05)
            seen.append(value("gptutor_event_loop_lag_seconds"))

    asyncio.run(block())
    assert seen[0] > 0.2
    assert seen[1] > 0.5
    assert value("gptutor_event_loop_lag_seconds") == 0


async def test_a_late_event_loop_is_forgotten_after_two_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_loop, "TICK_S", 0.001)
    monkeypatch.setattr(event_loop, "WINDOW_S", 0.01)
    lag = LoopLag()
    lag._longest = 100.0
    with lag.measured():
        async with asyncio.timeout(20):
            while lag.longest() >= 100:
                await asyncio.sleep(0.001)


def test_the_commit_is_read_from_the_clone(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert revision(tmp_path) == ""
    git = tmp_path / "a" / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert revision(tmp_path / "a") == ""
    (git / "packed-refs").write_text(f"# pack-refs\n{commit} refs/heads/main\n")
    assert revision(tmp_path / "a") == "0123456789ab"
    (git / "refs" / "heads" / "main").write_text("f" * 40)
    assert revision(tmp_path / "a") == "f" * 12
    (git / "HEAD").write_text(commit)
    assert revision(tmp_path / "a") == "0123456789ab"
    tree = git / "worktrees" / "b"
    tree.mkdir(parents=True)
    (tree / "HEAD").write_text("ref: refs/heads/main\n")
    (tree / "commondir").write_text("../..\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".git").write_text(f"gitdir: {tree}\n")
    assert revision(tmp_path / "b") == "f" * 12


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


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_metric_is_documented(page: Path) -> None:
    ours = {metric.name for metric in REGISTRY.collect() if metric.name.startswith("gptutor_")}
    assert len(ours) >= 11
    assert set(re.findall(r"^\| `(gptutor_\w+?)(?:_total)?(?:\{\w+(?:, \w+)*\})?` \|", page.read_text(), re.MULTILINE)) == ours
