"""VK launch parameters, and signing in with them."""

import json
import time
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

import pytest

from gptutor.integrations.vk import signature
from tests.support.gateway import Gateway

APP_ID = 6736218
VK_SECRET = "wvl68m4dR1UpLrVRli"
VK = {"vk": {"app_id": APP_ID, "secret_key": VK_SECRET}}
with_vk = pytest.mark.parametrize("tuned", [VK])


def launch(
    user_id: object = 494075, *, secret: str = VK_SECRET, unsigned: str = "", sign: str | None = None, **changed: Any
) -> str:
    """Signed launch parameters. Those changed to None are left out; `unsigned` is appended without being signed."""
    given = {
        "vk_user_id": user_id, "vk_app_id": APP_ID, "vk_is_app_user": 1, "vk_language": "ru",
        "vk_access_token_settings": "", "vk_platform": "mobile_web", "vk_ts": int(time.time()), **changed,
    }  # fmt: skip
    signed = {name: str(value) for name, value in given.items() if value is not None}
    return urlencode(signed) + unsigned + f"&sign={signature(signed, secret) if sign is None else sign}"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def send(gateway: Gateway, method: str, path: str, headers: Any) -> tuple[int, str, Any]:
    async with gateway.session.request(method, gateway.url + path, headers=headers) as response:
        document = json.loads(await response.read(), parse_float=Decimal)
        if response.status == 401:
            # apart from the request id and the date, all 401 responses are identical
            assert {**response.headers, "X-Request-ID": "", "Date": "", "Server": ""} == {
                "WWW-Authenticate": "Bearer", "X-Error-Code": "invalid_key", "X-Request-ID": "", "Date": "", "Server": "",
                "Content-Type": "application/json; charset=utf-8", "Content-Length": "45",
            }  # fmt: skip
        else:
            assert response.headers["Cache-Control"] == "no-store"
        return response.status, response.headers.get("X-Error-Code", ""), document


async def sign_in(gateway: Gateway, token: str | None = None) -> dict[str, Any]:
    status, _, document = await send(gateway, "GET", "/vk-test", bearer(token or launch()))
    assert status == 200
    return dict(document)
