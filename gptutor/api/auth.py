"""Whose account a request speaks for: an API key, or on the account's own endpoints VK's launch parameters (contract D1, D5).

For chat completions the key is only read here: there the hold statement authenticates.
"""

import time
from collections.abc import Collection
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

from gptutor.errors import ApiError
from gptutor.http.address_limits import RequestCounter
from gptutor.http.health import DATABASE, READINESS
from gptutor.http.middlewares import Handler
from gptutor.http.rate_limit import RateLimit
from gptutor.integrations.vk import InvalidLaunch, Launch, verify
from gptutor.money.amounts import Nano
from gptutor.money.keyring import KeyRing
from gptutor.money.keys import KeyClaim, hash_key, parse_key
from gptutor.money.users import NoSuchUser, User, UserRepository

CLAIMS_MAX = 10_000
KEYRING = web.AppKey("keyring", KeyRing)
CLAIM = web.RequestKey("claim", KeyClaim)
USER = web.RequestKey("user", User)
MANAGES_KEYS = web.RequestKey("manages_keys", bool)
"""Whether the request speaks with the main key, or by a sign-in; all other keys only use the account."""


class VkSignIn:
    """Sign-in by VK. Without the app's secret it lets nobody in."""

    def __init__(self, *, app_id: int, secret: str, age_s_max: float, bonus: Nano) -> None:
        self._app_id = app_id
        self._secret = secret
        self._age_s_max = age_s_max
        self._bonus = bonus

    def verify(self, token: str) -> Launch:
        """Raises ApiError."""
        if not self._secret:
            raise ApiError("invalid_key", cause="VK_SECRET_KEY is not set")
        try:
            return verify(token, app_id=self._app_id, secret=self._secret, now=time.time(), age_s_max=self._age_s_max)
        except InvalidLaunch as error:
            raise ApiError("invalid_key", cause=f"VK: {error}") from error

    async def admit(self, users: UserRepository, token: str) -> tuple[User, Launch]:
        """The person's account, made at the first sight of him. Raises ApiError."""
        launch = self.verify(token)
        user, _ = await users.of_person("vk", str(launch.user_id), name=f"vk {launch.user_id}", bonus=self._bonus)
        if not user.is_active:
            raise ApiError("invalid_key", cause="the user is inactive")
        return user, launch


VK_SIGN_IN = web.AppKey("vk_door", VkSignIn)


def authenticate(keyed: Collection[Any], personal: Collection[Any], own_pages: RequestCounter) -> Middleware:
    """For `keyed` handlers: what key does the caller claim, in CLAIM? Whether it is true is asked of the database by the hold.

    For `personal` ones: the account that the request speaks for, in USER, and with which right, in MANAGES_KEYS. Claims that were
    read before are remembered, by the hash of their key: reading one anew costs five times as much.
    """
    known: dict[bytes, KeyClaim] = {}

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        called = request.match_info.handler
        if called in keyed:
            request[CLAIM] = _claimed_key(bearer_token(request), known)
        elif called in personal:
            request[USER], request[MANAGES_KEYS] = await _speaker(request)
            account = str(request[USER].account_id)
            if own_pages.is_used_up(account):
                raise RateLimit(own_pages.per_minute).refusal()
            own_pages.add(account)
        return await handler(request)

    return middleware


def _claimed_key(key: str, known: dict[bytes, KeyClaim]) -> KeyClaim:
    """Raises ApiError for what cannot be a key of ours."""
    digest = hash_key(key)
    claim = known.get(digest)
    if claim is None:
        claim = parse_key(key)
        if claim is None:
            raise ApiError("invalid_key")
        if len(known) >= CLAIMS_MAX:
            known.clear()
        known[digest] = claim
    return claim


async def _speaker(request: web.Request) -> tuple[User, bool]:
    token = bearer_token(request)
    request.app[READINESS].require()
    users = UserRepository(request.app[DATABASE])
    if not token.startswith("sk-"):
        user, _ = await request.app[VK_SIGN_IN].admit(users, token)
        return user, True
    claim = parse_key(token)
    key = await request.app[KEYRING].opened_by(claim) if claim is not None else None
    if claim is None or key is None:
        raise ApiError("invalid_key")
    try:
        return await users.find(claim.account_id), key.is_main
    except NoSuchUser:
        raise ApiError("invalid_key") from None


def bearer_token(request: web.Request) -> str:
    """The one credential of a request. Raises ApiError."""
    headers = request.headers.getall("Authorization", [])
    scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    token = token.strip()
    if not token or scheme.lower() != "bearer":
        raise ApiError("invalid_key")
    return token
