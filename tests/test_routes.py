"""The table of routes is what the service does: who may call a row, what limits it, and how it is described (contract A8, B3, B6, D6)."""

import inspect
from typing import Any

import pytest
from aiohttp import web

from gptutor.config.schema import RateLimitSettings
from gptutor.http.routing import Route, add_routes
from gptutor.routes import METHODS, ROUTES
from gptutor.web import openapi
from tests.support.gateway import Gateway

DESCRIBED = openapi.describe()["paths"]
SECURITY: dict[str, list[dict[str, list[str]]]] = {
    "public": [],
    "api_key": [{"ApiKey": []}],
    "account": [{"ApiKey": []}, {"VkLaunch": []}],
    "vk": [{"VkLaunch": []}],
}
BY_ADDRESS = ("models_per_minute", "sign_ins_per_minute", "notifications_per_minute")


def label(row: Route) -> str:
    return f"{row.method} {path_of(row)}"


def path_of(row: Route) -> str:
    """Without the patterns of its parameters: `/v1/keys/{key_id}`."""
    return web.Application().router.add_resource(row.path).canonical


def sample_path(row: Route) -> str:
    return path_of(row).replace("{key_id}", "1").replace("{model_id}", "openai/gpt-4o-mini")


async def status_of(gateway: Gateway, row: Route, headers: dict[str, str]) -> int:
    async with gateway.session.request(row.method, gateway.url + sample_path(row), headers=headers) as response:
        return response.status


@pytest.mark.parametrize("row", ROUTES, ids=label)
def test_every_route_is_described_with_its_access_and_its_limit(row: Route) -> None:
    operation = DESCRIBED[path_of(row)][row.method.lower()]
    assert operation.get("security", []) == SECURITY[row.access]
    assert ("401" in operation["responses"]) is (row.access != "public")
    assert ("429" in operation["responses"]) is (row.limit is not None)


def test_nothing_is_described_that_is_no_route() -> None:
    described = {f"{method.upper()} {path}" for path, operations in DESCRIBED.items() for method in operations}
    assert described == {label(row) for row in ROUTES}


def test_rows_are_distinct_and_name_real_handlers_and_settings() -> None:
    assert len({(row.method, row.path) for row in ROUTES}) == len(ROUTES)
    assert all(inspect.iscoroutinefunction(row.handler) for row in ROUTES)
    assert {row.limit for row in ROUTES if row.limit} <= set(RateLimitSettings.__struct_fields__)
    assert all(row.limit for row in ROUTES if row.access != "public")
    assert set(METHODS) == {row.method for row in ROUTES} | {"OPTIONS"}


def test_get_answers_head_as_well() -> None:
    app = web.Application()
    add_routes(app, ROUTES)
    registered = {(route.resource.canonical, route.method) for route in app.router.routes() if route.resource is not None}
    assert registered == {(path_of(row), row.method) for row in ROUTES} | {
        (path_of(row), "HEAD") for row in ROUTES if row.method == "GET"
    }


@pytest.mark.parametrize("tuned", [{"rate_limit": {"unauthenticated_per_minute": 0}}])
async def test_every_route_that_is_not_public_needs_credentials(gateway: Gateway) -> None:
    unauthorized = {label(row): await status_of(gateway, row, {}) == 401 for row in ROUTES}
    assert unauthorized == {label(row): row.access != "public" for row in ROUTES}


@pytest.mark.parametrize(
    "tuned",
    [
        {
            "server": {"trusted_proxies": ""},
            "rate_limit": {"unauthenticated_per_minute": 0, "account_pages_per_minute": 1, **dict.fromkeys(BY_ADDRESS, 1)},
        }
    ],
)
async def test_every_limit_of_a_route_is_enforced(gateway: Gateway) -> None:
    """Routes that share a limit share its count, except that each account has its own."""
    limited: dict[str, Any] = {}
    for row in ROUTES:
        client = await gateway.client()
        headers = client.headers if row.access == "account" else {}
        await status_of(gateway, row, headers)
        limited[label(row)] = await status_of(gateway, row, headers) == 429
    in_memory = (*BY_ADDRESS, "account_pages_per_minute")
    assert limited == {label(row): row.limit in in_memory for row in ROUTES}
