"""Rate limits per client address, in the memory of each process, for clients without an account (contract A8).

They stop clients that guess keys, sign in over and over or poll the model list, before any SQL runs. A client with a key is
limited by its account, exactly and across processes, by the hold statement (`sql/functions`, `place_holds`); before that, the
requests that are refused are counted here, by `api.auth`.

The address is the connection's own, unless the connection comes from a trusted proxy: then the address is the last one in
X-Forwarded-For that is not a trusted proxy's.
"""

import asyncio
import ipaddress
import re
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gptutor.errors import ApiError
from gptutor.http.app_keys import KEY_VERIFIED, TRUSTED_PROXIES
from gptutor.http.authorization import credential_hash, public_key_part
from gptutor.http.rate_limit import MINUTE_S, RateLimit
from gptutor.http.routing import Limit, route_of
from gptutor.telemetry.logs import Caller

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
ADDRESSES_MAX = 100_000
"""Bounds the memory: above so many addresses in one minute, all further ones share one count."""
ADDRESS_WITH_PORT = re.compile(r"([0-9.]+):[0-9]{1,5}|\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?")
IPV6_PREFIX_BITS = 64
"""An IPv6 client owns a whole network of addresses, which is counted as one address."""
FLOOD_FACTOR = 2
"""Above this multiple of the limit, errors are sent after FLOOD_DELAY_S, so that a client that repeats at once costs little."""
FLOOD_DELAY_S = 1.0


@dataclass(slots=True)
class RequestCounter:
    """Requests of this minute by key: an address, or an account. `per_minute` 0: no limit. `name`: of the limit, for the log."""

    per_minute: int
    name: str | None = None
    _minute: int = 0
    _counts: dict[Hashable, int] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was counted in this minute. Mostly so, and then no address need be determined."""
        return not (self._counts and self._current_counts())

    def is_used_up(self, key: Hashable) -> bool:
        """The empty key, for an unknown address, is never limited."""
        return bool(self.per_minute and key) and self._current_counts().get(self._bounded(key), 0) >= self.per_minute

    def add(self, key: Hashable, weight: int = 1) -> int:
        """Returns the count."""
        counts = self._current_counts()
        if key not in counts:
            key = self._bounded(key)
        count = counts[key] = counts.get(key, 0) + weight
        return count

    async def require_room(self, key: Hashable, weight: int = 1) -> None:
        """Counts a request, as `weight` ones. Raises ApiError above the limit; far above it, after a delay."""
        if self.per_minute and key:
            count = self.add(key, weight)
            if count > self.per_minute:
                await self.reject(count)

    async def reject(self, count: int) -> NoReturn:
        """Raises ApiError, after a delay if `count` is far above the limit."""
        if count > FLOOD_FACTOR * self.per_minute:
            await asyncio.sleep(FLOOD_DELAY_S)
        raise RateLimit(self.per_minute).error(self.name)

    def take_back(self, key: Hashable, weight: int = 1) -> None:
        """The request is not to be counted after all. (If a new minute has begun, there may be nothing to take back.)"""
        if key in self._counts:
            self._counts[key] = max(0, self._counts[key] - weight)

    def _current_counts(self) -> dict[Hashable, int]:
        minute = int(time.time()) // MINUTE_S
        if minute != self._minute:
            self._minute, self._counts = minute, {}
        return self._counts

    def _bounded(self, key: Hashable) -> Hashable:
        return key if len(self._counts) < ADDRESSES_MAX or key in self._counts else "others"


def limit_by_address(
    counters: Mapping[Limit, RequestCounter],
    unauthenticated: RequestCounter,
    not_found: RequestCounter,
    *,
    trusted_proxies: Sequence[Network],
    not_counted: tuple[type[Exception], ...] = (),
) -> Middleware:
    """Counts requests by the limit of their route, if it is one of `counters`, and failed authentication by `unauthenticated`.

    Requests for paths and methods that do not exist are counted by `not_found`. Failures whose cause is one of `not_counted` are
    no attempts to guess a credential. Once an address has used up `unauthenticated`, only credentials that were accepted recently
    pass. A credential is accepted if the handler says so (KEY_VERIFIED), or makes no error.
    """
    accepted = RecentCredentials()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        route = route_of(request)
        if route is None:
            await not_found.require_room(client_address(request, trusted_proxies))
            return await handler(request)
        if route.limit is not None and (counter := counters.get(route.limit)) is not None:
            await counter.require_room(client_address(request, trusted_proxies))
        if route.access == "public":
            return await handler(request)
        credential = credential_hash(request)
        if (
            not unauthenticated.is_empty
            and credential not in accepted
            and unauthenticated.is_used_up(address := client_address(request, trusted_proxies))
        ):
            await unauthenticated.reject(unauthenticated.add(address))
        try:
            response = await handler(request)
        except ApiError as error:
            if error.code == "invalid_key" and not isinstance(error.__cause__, not_counted):
                unauthenticated.add(client_address(request, trusted_proxies))
                accepted.discard(credential)
            elif request.get(KEY_VERIFIED):
                accepted.add(credential)
            raise
        accepted.add(credential)
        return response

    return middleware


class RecentCredentials:
    """Hashes of credentials that were accepted recently, so that a client with a key is not limited by its address.

    Being in here authenticates nobody: the database checks each request.
    """

    def __init__(self) -> None:
        self._newer: set[int] = set()
        self._older: set[int] = set()

    def add(self, credential: int) -> None:
        if credential in self._newer:
            return
        if len(self._newer) >= ADDRESSES_MAX:
            self._older, self._newer = self._newer, set()
        self._newer.add(credential)

    def discard(self, credential: int) -> None:
        self._newer.discard(credential)
        self._older.discard(credential)

    def __contains__(self, credential: int) -> bool:
        return credential in self._newer or credential in self._older


def client_address(request: web.Request, trusted_proxies: Sequence[Network]) -> str:
    """Empty if unknown: the connection is a trusted proxy's, and X-Forwarded-For names no other address."""
    hops = [request.remote or "", *reversed(",".join(request.headers.getall("X-Forwarded-For", [])).split(","))]
    for hop in hops:
        try:
            parsed = ipaddress.ip_address(_without_port(hop.strip()))
        except ValueError:
            break  # no trusted proxy wrote this entry, so neither it nor the earlier ones can be believed
        if address := network_of(parsed, trusted_proxies):
            return address
    return ""


def caller_of(request: web.Request) -> Caller:
    """Who sent the request, for the log."""
    return Caller(client_address(request, request.app[TRUSTED_PROXIES]) or None, public_key_part(request))


def _without_port(hop: str) -> str:
    """`192.0.2.1:5678` → `192.0.2.1`, `[2001:db8::1]:80` → `2001:db8::1`: some proxies write the port as well."""
    found = ADDRESS_WITH_PORT.fullmatch(hop)
    return found[1] or found[2] if found else hop


def network_of(address: ipaddress.IPv4Address | ipaddress.IPv6Address, trusted_proxies: Sequence[Network]) -> str:
    """What is counted as one address; empty for a trusted proxy's."""
    address = getattr(address, "ipv4_mapped", None) or address
    if any(address in network for network in trusted_proxies):
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, IPV6_PREFIX_BITS), strict=False))
    return str(address)


def parse_networks(text: str) -> list[Network]:
    """Addresses and networks, separated by spaces. Raises ValueError."""
    return [ipaddress.ip_network(name) for name in text.split()]
