"""The model list: for clients, for prices, and over a restart (contract E1, C4; row money-16)."""

import asyncio
import json
import math
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gptutor.api.models import ModelList
from gptutor.http.app_keys import SERVICES
from gptutor.openrouter.catalogue import Catalogue, ModelPrice, parse_models, refreshed
from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.retry import Failure
from tests.support.gateway import Gateway

MODEL = "google/gemini-2.5-flash-lite"


def listing(*models: dict[str, Any]) -> bytes:
    return json.dumps({"data": [{"pricing": {"prompt": "0.1", "completion": "0.2"}, **model} for model in models]}).encode()


def price_of(pricing: dict[str, Any]) -> ModelPrice | None:
    catalogue = Catalogue()
    catalogue.replace(listing({"id": "a/b", "pricing": pricing}))
    return catalogue.price("a/b")


async def get(gateway: Gateway, path: str, known: str = "") -> tuple[int, str, bytes]:
    """Status, ETag and body, for a client that has the ETags `known`."""
    headers = {"If-None-Match": known} if known else {}
    async with gateway.session.get(gateway.url + path, headers=headers) as response:
        return response.status, response.headers["ETag"], await response.read()


# -- for clients


@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{MODEL}"])
async def test_a_current_etag_is_304(gateway: Gateway, path: str) -> None:
    status, tag, document = await get(gateway, path)
    assert status == 200
    assert not tag.startswith("W/")
    for known in (tag, f'"other", {tag}', "*", f"W/{tag}"):
        assert await get(gateway, path, known) == (304, tag, b"")
    for known in ('"other"', ""):
        assert await get(gateway, path, known) == (200, tag, document)


async def test_the_etag_changes_only_with_the_list(gateway: Gateway) -> None:
    catalogue = gateway.app[SERVICES].catalogue
    version, tag = catalogue.version, (await get(gateway, "/v1/models"))[1]
    catalogue.replace(gateway.simulator.model_list)
    assert catalogue.version == version
    catalogue.replace(listing({"id": "a/b"}))
    assert (await get(gateway, "/v1/models"))[1] != tag


async def test_the_list_is_rendered_once_for_all_requests() -> None:
    catalogue = Catalogue()
    catalogue.replace(listing({"id": "a/b"}))
    models = ModelList(catalogue, Decimal(90))
    assert models.all() is models.all()
    assert json.loads(models.all().body)["data"][0]["pricing_rub"] == {"prompt": "9.0", "completion": "18.0"}


async def test_prices_in_roubles_are_exact_and_absent_where_there_is_no_price(gateway: Gateway) -> None:
    models = {model["id"]: model for model in json.loads((await get(gateway, "/v1/models"))[2])["data"]}
    assert models[MODEL]["pricing"]["prompt"] == "0.0000001"
    assert Decimal(models[MODEL]["pricing_rub"]["prompt"]) == Decimal("0.0000090")
    assert "prompt" not in models["openrouter/auto"]["pricing_rub"]
    assert models["openrouter/auto"]["pricing"]["prompt"] == "-1"


# -- for prices


@pytest.mark.parametrize(
    "pricing",
    [
        {},
        {"prompt": "1"},
        {"prompt": "-1", "completion": "-1"},
        {"prompt": "NaN", "completion": "1"},
        {"prompt": "Infinity", "completion": "1"},
        {"prompt": "1", "completion": "1e400"},
        {"prompt": "1", "completion": "1", "request": "-1"},
        {"prompt": "1", "completion": "1", "input_cache_write": "?"},
        {"prompt": "1", "completion": "1", "overrides": [{"completion": "-1"}]},
    ],
)
def test_invalid_prices_never_enter_arithmetic(pricing: dict[str, Any]) -> None:
    assert price_of(pricing) is None


def test_the_highest_price_of_each_kind_bounds_the_cost() -> None:
    price = price_of(
        {
            "prompt": "1", "completion": "2", "internal_reasoning": "3", "request": "4", "image": "5", "audio": "6",
            "input_cache_write": "7", "image_output": "8", "web_search": "9", "discount": 0.5,
            "overrides": [{"min_prompt_tokens": 200000, "prompt": "10", "completion": "20"}, {"prompt": "0.5"}],
        }
    )  # fmt: skip
    assert price is not None
    found = (
        price.prompt_usd, price.completion_usd, price.request_usd, price.image_usd, price.media_usd, price.cache_write_usd,
        price.rich_completion_usd, price.search_usd, price.base_prompt_usd, price.base_completion_usd,
    )  # fmt: skip
    assert found == (10, 20, 4, 5, 6, 7, 20, 9, 1, 2)


FILES = {"input_modalities": ["text", "file"], "output_modalities": ["text"]}
TOOLS = ["tools", "max_tokens"]


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ({"pricing": {"prompt": "1", "completion": "2"}}, set()),
        ({"pricing": {"prompt": "1", "completion": "2"}, "architecture": FILES}, {"reads_documents"}),
        ({"pricing": {"prompt": "0", "completion": "0"}}, {"has_unlisted_prices"}),
        ({"id": "a/b:free", "pricing": {"prompt": "0", "completion": "0"}}, set()),
        ({"pricing": {"prompt": "0", "completion": "0", "image_output": "3"}}, {"outputs_media", "has_unlisted_prices"}),
        ({"pricing": {"prompt": "1", "completion": "2", "image_output": "3"}}, {"outputs_media"}),
        ({"pricing": {"prompt": "1", "completion": "2", "audio_output": "3"}, "architecture": FILES}, {"reads_documents"}),
        (
            {"pricing": {"prompt": "1", "completion": "2"}, "architecture": {"output_modalities": ["text", "image"]}},
            {"outputs_media", "has_unlisted_prices"},
        ),
        (
            {
                "pricing": {"prompt": "1", "completion": "2", "audio_output": "3"},
                "architecture": {"output_modalities": ["audio"]},
            },
            {"outputs_media"},
        ),
        ({"pricing": {"prompt": "1", "completion": "2", "web_search": "3"}}, {"searches"}),
        ({"pricing": {"prompt": "1", "completion": "2", "web_search": "3"}, "supported_parameters": TOOLS}, set()),
        (
            {"id": "a/b-search", "pricing": {"prompt": "1", "completion": "2", "web_search": "3"}, "supported_parameters": TOOLS},
            {"searches"},
        ),
        ({"id": "a/b-deep-research", "pricing": {"prompt": "1", "completion": "2"}}, {"searches", "researches"}),
    ],
)
def test_what_a_model_does_at_a_price_of_its_own_is_read_from_the_list(model: dict[str, Any], found: set[str]) -> None:
    """Prices that are missing are unknown, not zero; only the suffix `:free` means that nothing is charged."""
    (read,) = parse_models(listing({"id": "a/b", **model}))
    names = ("outputs_media", "has_unlisted_prices", "reads_documents", "searches", "researches")
    assert {name for name in names if getattr(read.price, name)} == found


def test_a_model_is_found_by_its_variants_and_its_permanent_slug() -> None:
    catalogue = Catalogue()
    free = {"id": "a/b:free", "canonical_slug": "a/b-2026", "pricing": {"prompt": "0", "completion": "0"}}
    catalogue.replace(listing({"id": "a/b", "canonical_slug": "a/b-2026"}, free))
    assert (
        catalogue.price("a/b") == catalogue.price("a/b:nitro") == catalogue.price("a/b-2026") == catalogue.price("a/b-2026:floor")
    )
    assert catalogue.price("a/b:free") not in (None, catalogue.price("a/b"))
    assert catalogue.price("a/c") is None


@pytest.mark.parametrize(
    ("model", "lacking"),
    [("a/b", False), ("a/b:online", False), ("a/c", True), ("a/c:free", True), ("@preset/x", False), ("a/c@preset/x", False), ("~a/c-latest", False)],
)  # fmt: skip
def test_a_model_is_unknown_only_if_the_list_is_fresh(model: str, lacking: bool) -> None:
    catalogue = Catalogue()
    catalogue.replace(listing({"id": "a/b"}))
    assert not catalogue.is_unknown(model)
    catalogue.fetched_at = math.inf
    assert catalogue.is_unknown(model) is lacking


# -- over a restart


class Upstream:
    """OpenRouter's model list: gives the responses in their order, and the last one for ever."""

    def __init__(self, answers: Iterable[bytes | Exception]) -> None:
        self.answers = list(answers)
        self.request_count = 0

    async def models(self) -> bytes:
        answer = self.answers[min(self.request_count, len(self.answers) - 1)]
        self.request_count += 1
        if isinstance(answer, Exception):
            raise answer
        return answer


AWAY = UpstreamError(Failure("unreachable"))


async def test_the_saved_list_serves_after_a_restart_without_openrouter(tmp_path: Path) -> None:
    copy = tmp_path / "var" / "models.json"
    async with refreshed(Upstream([listing({"id": "a/b"})]), 60, copy) as catalogue:  # type: ignore[arg-type]
        assert "a/b" in catalogue.models
        assert catalogue.is_fresh
    async with refreshed(Upstream([AWAY]), 60, copy) as catalogue:  # type: ignore[arg-type]
        assert "a/b" in catalogue.models
        assert not catalogue.is_fresh
    assert list(copy.parent.iterdir()) == [copy]


async def test_a_saved_list_is_served_at_once_and_refreshed_in_the_background(tmp_path: Path) -> None:
    copy = tmp_path / "models.json"
    copy.write_bytes(listing({"id": "old/model"}))
    async with refreshed(Upstream([listing({"id": "new/model"})]), 60, copy) as catalogue:  # type: ignore[arg-type]
        assert list(catalogue.models) == ["old/model"]
        async with asyncio.timeout(5):
            while not catalogue.is_fresh:
                await asyncio.sleep(0.01)
        assert list(catalogue.models) == ["new/model"]
    assert copy.read_bytes() == listing({"id": "new/model"})


@pytest.mark.parametrize(
    "document", [b"", b"{", b'{"data": []}', b"\xff", b'{"data": [{"id": "a\xff"}]}', b'{"data":' + b"[" * 100_000]
)
async def test_a_broken_saved_list_is_ignored(tmp_path: Path, document: bytes) -> None:
    copy = tmp_path / "models.json"
    copy.write_bytes(document)
    async with refreshed(Upstream([listing({"id": "a/b"})]), 60, copy) as catalogue:  # type: ignore[arg-type]
        assert list(catalogue.models) == ["a/b"]


async def test_a_response_that_is_not_a_model_list_does_not_replace_the_list(tmp_path: Path) -> None:
    upstream = Upstream([listing({"id": "a/b"}), b"<html>", AWAY, b'{"data": []}'])
    async with refreshed(upstream, 0.01, tmp_path / "models.json") as catalogue:  # type: ignore[arg-type]
        async with asyncio.timeout(5):
            while upstream.request_count < 5:
                await asyncio.sleep(0.01)
        assert list(catalogue.models) == ["a/b"]
    assert (tmp_path / "models.json").read_bytes() == listing({"id": "a/b"})
