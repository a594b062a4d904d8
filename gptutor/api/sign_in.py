"""`GET /vk-test` and `POST /update-token`: what VK's launch parameters alone open (contract D1, D3). An API key does not."""

import datetime
import logging
from typing import Any

from aiohttp import web

from gptutor.api.auth import KEYRING, VK_SIGN_IN, bearer_token
from gptutor.errors import ApiError
from gptutor.http.health import DATABASE, READINESS
from gptutor.http.json_response import amount, answer, moment
from gptutor.integrations.vk import Launch
from gptutor.money.users import User, UserRepository
from gptutor.money.vault import DecryptionFailed

LOGGER = logging.getLogger("gptutor.accounts")
SHOWN = ("vk_user_id", "vk_app_id", "vk_is_app_user", "vk_language", "vk_platform", "vk_ts")


async def vk_test(request: web.Request) -> web.Response:
    """Who signs in, as VK says it, and the account, with its main key. Asked again, it answers the same."""
    user, launch = await _admitted(request)
    try:
        key = await request.app[KEYRING].main(user.account_id)
    except DecryptionFailed as error:
        LOGGER.error("The copy of a key does not open: is GPTUTOR_SECRET_KEY the one that it was made with? See old_secret_keys.")
        raise ApiError("internal_error", cause="the copy of the key does not open") from error
    return answer(
        {
            "message": "VK launch parameters are valid",
            "vkData": {name: launch.parameters.get(name) for name in SHOWN},
            "dbUser": _shown(user, launch) | {"apiKey": key},
            "timestamp": _now(),
        }
    )


async def update_token(request: web.Request) -> web.Response:
    """A new main key; the one before is dead, in every process, when this answers. Other keys stay."""
    user, launch = await _admitted(request)
    key = await request.app[KEYRING].renew(user.account_id)
    return answer(
        {"message": "API key replaced", "newApiKey": key, "user": _shown(user, launch), "timestamp": _now()},
    )


async def _admitted(request: web.Request) -> tuple[User, Launch]:
    """Raises ApiError."""
    token = bearer_token(request)
    request.app[READINESS].require()
    return await request.app[VK_SIGN_IN].admit(UserRepository(request.app[DATABASE]), token)


def _shown(user: User, launch: Launch) -> dict[str, Any]:
    """`balance` is in roubles, exact."""
    return {
        "id": user.account_id,
        "vkId": str(launch.user_id),
        "balance": amount(user.balance),
        "isActive": user.is_active,
        "createdAt": moment(user.created_at),
        "updatedAt": moment(user.updated_at),
    }


def _now() -> str:
    return moment(datetime.datetime.now(datetime.UTC))
