"""Authentication: whose account a request acts for, by an API key or by VK's launch parameters (contract D1, D5).

For chat completions the key is only read here; the hold statement verifies it.
"""

import time

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gptutor.api.verified_keys import UNKNOWN, hide_duration
from gptutor.errors import ApiError
from gptutor.http.address_limits import RequestCounter
from gptutor.http.app_keys import CLAIM, DATABASE, KEYRING, LAUNCH, MANAGES_KEYS, READINESS, USER, VK_SIGN_IN
from gptutor.http.authorization import bearer_token
from gptutor.http.routing import route_of
from gptutor.integrations.vk import InvalidLaunch, Launch, verify
from gptutor.money.amounts import Nano
from gptutor.money.keys import KeyClaim, hash_key, parse_key
from gptutor.money.users import NoSuchUser, User, UserRepository

CACHED_CLAIMS_MAX = 10_000
MALFORMED = "the key is not one of ours, or has a typo"


class VkSignIn:
    """Sign-in by VK. Without the app's secret every sign-in is rejected. `bonus` is booked once for each new user."""

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

    async def sign_in(self, users: UserRepository, token: str) -> tuple[User, Launch]:
        """The user, created at the first sign-in. Raises ApiError."""
        launch = self.verify(token)
        user, _ = await users.of_person("vk", str(launch.user_id), name=f"vk {launch.user_id}", bonus=self._bonus)
        if not user.is_active:
            raise ApiError("invalid_key", cause="the user is inactive")
        return user, launch


def authenticate(account_pages: RequestCounter) -> Middleware:
    """Does what the route's `access` asks for; see `http.routing.Access`. Accounts' own requests are counted by `account_pages`.

    On `api_key` routes it sets CLAIM, from a cache by the key's hash where it can: parsing a key costs five times as much. On
    `account` routes it sets USER and MANAGES_KEYS, on `vk` routes USER and LAUNCH.
    """
    claims: dict[bytes, KeyClaim] = {}

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        route = route_of(request)
        if route is None or route.access == "public":
            return await handler(request)
        token = bearer_token(request)
        if route.access == "api_key":
            request[CLAIM] = _claim(token, claims)
        elif route.access == "account":
            request[USER], request[MANAGES_KEYS] = await _account_owner(request, token)
            await account_pages.require_room(str(request[USER].account_id))
        else:
            request.app[READINESS].require()
            users = UserRepository(request.app[DATABASE])
            request[USER], request[LAUNCH] = await request.app[VK_SIGN_IN].sign_in(users, token)
        return await handler(request)

    return middleware


def _claim(key: str, claims: dict[bytes, KeyClaim]) -> KeyClaim:
    """The parsed key. Raises ApiError for a text that no key of ours can be."""
    digest = hash_key(key)
    claim = claims.get(digest)
    if claim is None:
        claim = parse_key(key)
        if claim is None:
            raise ApiError("invalid_key", cause=MALFORMED)
        if len(claims) >= CACHED_CLAIMS_MAX:
            claims.clear()
        claims[digest] = claim
    return claim


async def _account_owner(request: web.Request, token: str) -> tuple[User, bool]:
    """The user, and whether the client may change the account's keys. Raises ApiError."""
    request.app[READINESS].require()
    users = UserRepository(request.app[DATABASE])
    if not token.startswith("sk-"):
        user, _ = await request.app[VK_SIGN_IN].sign_in(users, token)
        return user, True
    claim = parse_key(token)
    if claim is None:
        raise ApiError("invalid_key", cause=MALFORMED)
    started = time.monotonic()
    key = await request.app[KEYRING].opened_by(claim)
    if key is None:
        await hide_duration(started)
        raise ApiError("invalid_key", cause=UNKNOWN)
    try:
        return await users.find(claim.account_id), key.is_main
    except NoSuchUser:
        raise ApiError("invalid_key", cause=UNKNOWN) from None
