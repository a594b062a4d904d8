"""`GET /vk-test` and `POST /update-token`: sign-in by VK's launch parameters (contract D1, D3). API keys are not accepted.

The shapes are those of the documented API: camel case, and the balance as a number.
"""

import datetime
import logging
from typing import Any

from aiohttp import web

from gptutor.errors import ApiError
from gptutor.http.app_keys import KEYRING, LAUNCH, USER
from gptutor.http.responses import json_response, roubles_as_number, timestamp
from gptutor.money.vault import DecryptionFailed

LOGGER = logging.getLogger("gptutor.accounts")
VK_FIELDS = ("vk_user_id", "vk_app_id", "vk_is_app_user", "vk_language", "vk_platform", "vk_ts")


async def vk_test(request: web.Request) -> web.Response:
    """VK's data about the user, and the account with its main key. Idempotent."""
    user, launch = request[USER], request[LAUNCH]
    try:
        key = await request.app[KEYRING].main(user.account_id)
    except DecryptionFailed as error:
        LOGGER.error(
            "The encrypted copy of an API key cannot be decrypted. Was it made with another GPTUTOR_SECRET_KEY? "
            "See security.old_secret_keys."
        )
        raise ApiError("internal_error", cause="the encrypted copy of the key cannot be decrypted") from error
    return json_response(
        {
            "message": "VK launch parameters are valid",
            "vkData": {name: launch.parameters.get(name) for name in VK_FIELDS},
            "dbUser": _user_json(request) | {"apiKey": key},
            "timestamp": _now(),
        }
    )


async def update_token(request: web.Request) -> web.Response:
    """Replaces the main key. The old one is invalid in every process before the response is sent; other keys are not changed."""
    key = await request.app[KEYRING].renew(request[USER].account_id)
    return json_response(
        {"message": "API key replaced", "newApiKey": key, "user": _user_json(request), "timestamp": _now()},
    )


def _user_json(request: web.Request) -> dict[str, Any]:
    user = request[USER]
    return {
        "id": user.account_id,
        "vkId": str(request[LAUNCH].user_id),
        "balance": roubles_as_number(user.balance),
        "isActive": user.is_active,
        "createdAt": timestamp(user.created_at),
        "updatedAt": timestamp(user.updated_at),
    }


def _now() -> str:
    return timestamp(datetime.datetime.now(datetime.UTC))
