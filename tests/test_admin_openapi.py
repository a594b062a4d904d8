"""The administrators' API does what its OpenAPI description says: routes, requests, and every response, errors included."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from jsonschema import Draft202012Validator

from gptutor.admin.app import build_admin
from gptutor.config.schema import Config, SimulatorSettings
from gptutor.database.pool import Database
from gptutor.errors import ERRORS
from gptutor.money.holds import HandOver
from gptutor.money.users import UserRepository
from gptutor.server.serve import simulated_openrouter
from gptutor.simulator.server import Simulator
from gptutor.telemetry.logs import LoggerService
from gptutor.web import openapi
from gptutor.web.site import OPENAPI_ADMIN, build_site
from tests.support.admin import ANNAS, Admin, admin_on
from tests.support.gateway import make_client
from tests.support.late import LateImport
from tests.support.ledger import hold, ledger_of, settlement

if TYPE_CHECKING:
    import openapi_spec_validator
else:
    openapi_spec_validator = LateImport("openapi_spec_validator")

DOCUMENT = openapi.describe_admin()
OPERATIONS = {
    (method.upper(), path): operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if method != "parameters"
}


def strict(schema: Any) -> Any:
    """The schema, in which an object has no members that are not described."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: value if name == "allOf" else strict(value) for name, value in schema.items()}
    return inner | ({"unevaluatedProperties": False} if "$ref" in schema or "allOf" in schema else {})


def validate(value: Any, schema: Any) -> None:
    Draft202012Validator({**strict(schema), "components": DOCUMENT["components"]}).validate(value)


def resolved(item: Any) -> Any:
    """What a `$ref` leads to."""
    while "$ref" in item:
        found: Any = DOCUMENT
        for part in item["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        item = found
    return item


@dataclass
class Described:
    """Sends requests, and compares each response with the description of its operation."""

    admin: Admin
    seen: set[tuple[str, str, int]] = field(default_factory=set)

    async def send(
        self, method: str, path: str, body: Any = None, *, query: str = "", status: int = 200, token: str = ANNAS, **ids: Any
    ) -> Any:
        operation = OPERATIONS[method, path]
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        address = f"http://admin{path.format(**ids)}{query}"
        async with self.admin.session.request(method, address, headers=headers, data=data) as response:
            text, described = await response.text(), resolved(operation["responses"][str(response.status)])
            assert response.status == status, text
        self.seen.add((method, path, status))
        for name, header in described["headers"].items():
            if name in response.headers:
                validate(response.headers[name], resolved(header)["schema"])
            else:
                assert not resolved(header).get("required"), name
        content = described["content"][response.content_type]
        document = json.loads(text) if response.content_type == "application/json" else text
        validate(document, content["schema"])
        if body is not None and not isinstance(body, bytes) and status < 300:
            validate(body, operation["requestBody"]["content"]["application/json"]["schema"])
        return document["data"] if isinstance(document, dict) and "data" in document else document


@pytest.fixture
async def described(database_url: str, database: Database, tmp_path: Path) -> AsyncIterator[Described]:
    async with (
        simulated_openrouter(Simulator(), SimulatorSettings(port=0)) as base_url,
        admin_on(database_url, database, tmp_path, base_url) as admin,
    ):
        yield Described(admin)


def test_it_describes_exactly_the_routes_of_the_administrators_application() -> None:
    app = build_admin(Config(), log=LoggerService(), secrets=[b"x" * 32])
    routes = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource is not None}
    assert set(OPERATIONS) == {(method, path) for method, path in routes if method != "HEAD"}


def test_it_is_valid_and_every_example_follows_it() -> None:
    openapi_spec_validator.validate(DOCUMENT)
    for operation in OPERATIONS.values():
        if "requestBody" in operation:
            content = operation["requestBody"]["content"]["application/json"]
            validate(content["example"], content["schema"])


def test_strict_schemas_reject_what_is_not_described() -> None:
    with pytest.raises(Exception, match="surplus"):
        validate({"forfeit": True, "surplus": 1}, {"$ref": "#/components/schemas/Erasure"})
    with pytest.raises(Exception, match="surplus"):
        validate({"a": 1, "surplus": 1}, {"allOf": [{"properties": {"a": {}}}]})


async def test_every_response_is_as_described(described: Described) -> None:
    """Contract B1, F10, C11: each operation with a success, and with each error that a request can cause."""
    send, user = described.send, "/admin/users/{user_id}"
    made = await send("POST", "/admin/users", {"name": "Иван", "balance": "100,5"}, status=201)
    ids: Any = {"user_id": made["id"]}
    client = await make_client(described.admin.database, "10")
    person, _ = await UserRepository(described.admin.database).of_person("vk", "494075")
    charged = await hold(described.admin.database, client, "5")
    await ledger_of(described.admin.database).settle(settlement(charged, "0.01"))
    waiting = await hold(described.admin.database, client, "2")
    await ledger_of(described.admin.database).hand_over(HandOver(client.account_id, waiting.hold_id, "gen-1"))

    await send("GET", "/admin/users")
    await send("GET", "/admin/users", query="?query=иван")
    await send("GET", user, user_id=person.account_id)
    await send("PATCH", user, {"name": "Пётр", "contact": "petr@example.org", "note": "asks often"}, **ids)
    await send("POST", user + "/deactivate", **ids)
    await send("POST", user + "/activate", **ids)
    limits = {"name": "bot", "limit": 5, "limit_reset": "daily", "requests_per_minute": 3, "expires_at": "2999-12-31"}
    key = await send("POST", user + "/keys", limits, status=201, **ids)
    await send("GET", user + "/keys", **ids)
    await send("PATCH", user + "/keys/{key_id}", {"limit": None}, key_id=key["id"], **ids)
    await send("DELETE", user + "/keys/{key_id}", key_id=key["id"], **ids)
    await send("POST", user + "/rotate-key", status=201, **ids)
    await send("POST", user + "/bookings", {"kind": "bonus", "amount": 5, "reason": "x", "reference": "b"}, status=201, **ids)
    await send("POST", user + "/bookings", {"kind": "bonus", "amount": 5, "reference": "b"}, status=409, **ids)
    await send("GET", user + "/ledger", query="?limit=1", user_id=client.account_id)
    await send("POST", "/admin/payments", {"vk_id": "494075", "amount": "1", "reference": "1", "provider": "bank"})
    await send("POST", "/admin/payments", {"vk_id": "494075", "amount": "2", "reference": "1", "provider": "bank"}, status=409)
    await send("POST", "/admin/payments", {"vk_id": 1, "amount": "1", "reference": "2", "provider": "bank"}, status=404)
    await send("GET", "/admin/holds")
    await send("GET", "/admin/export/ledger")
    await send("GET", "/admin/export/ledger", query="?format=jsonl")
    await send("GET", "/admin/export/ledger", query="?user=999999999", status=404)
    await send("GET", "/admin/requests/{id}", id=charged.hold_id)
    await send("GET", "/admin/requests/{id}", id=waiting.hold_id)
    await send("GET", "/admin/report")
    for by in ("day", "month", "model", "user"):
        await send("GET", "/admin/report", query=f"?by={by}&cost_rub_per_usd=82.5")
    await send("GET", "/admin/verify")
    await send("GET", "/admin/reconcile")
    await send("GET", "/metrics")
    await send("POST", user + "/erase", status=400, **ids)
    await send("POST", user + "/erase", {"forfeit": True}, **ids)
    await send("PATCH", user, {"name": "x"}, status=400, **ids)

    nobody: Any = {"user_id": 999999999, "key_id": 1, "id": "nothing"}
    for (method, path), operation in OPERATIONS.items():
        await send(method, path, status=401, token="none", **nobody)
        if "{" in path:
            await send(method, path, EMPTY.get((method, path)), status=404, **nobody)
        if "requestBody" in operation:
            for body, status in ((b"{", 400), (b'{"unknown": 1}', 400), (b" " * 65_537, 413)):
                await send(method, path, body, status=status, **nobody)
        elif method == "GET" and path != "/metrics":
            await send(method, path, query="?unknown=1", status=400, **nobody)

    successes = {(method, path) for method, path, status in described.seen if status < 300}
    assert successes == set(OPERATIONS)
    caused = {400, 401, 404, 409, 413}
    for operation, row in OPERATIONS.items():
        documented = {int(status) for status in row["responses"]} & caused
        unprovoked = {400} if "requestBody" not in row and (operation[0] != "GET" or operation[1] == "/metrics") else set()
        assert {status for *of, status in described.seen if tuple(of) == operation} >= documented - unprovoked, operation


EMPTY: dict[tuple[str, str], Any] = {
    ("PATCH", "/admin/users/{user_id}"): {"name": ""},
    ("POST", "/admin/users/{user_id}/keys"): {},
    ("PATCH", "/admin/users/{user_id}/keys/{key_id}"): {},
    ("POST", "/admin/users/{user_id}/bookings"): {"kind": "bonus", "amount": 1},
}
"""Valid bodies, for users that do not exist."""


def test_its_error_codes_are_codes_of_the_list() -> None:
    assert set(DOCUMENT["components"]["schemas"]["ErrorCode"]["enum"]) <= set(ERRORS)


async def test_the_documentation_site_has_it_beside_the_public_one(aiohttp_client: Any) -> None:
    site = await aiohttp_client(build_site())
    async with site.get(OPENAPI_ADMIN) as response:
        assert await response.json() == DOCUMENT
    async with site.get("/reference-admin") as response:
        assert f'data-url="{OPENAPI_ADMIN}"' in await response.text()
