"""Limits for those who have no account yet: requests per minute and address, kept in the memory of each process (contract A8).

They hold off whoever guesses keys, signs in over and over, or reads the model list all day, before any SQL. Whoever has a key is
limited by his account, exactly and everywhere; see `sql/migrations`, `take_holds`.

The address is the connection's own, unless that is a trusted proxy's: then it is the last in X-Forwarded-For that is not one.
"""

import ipaddress
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

from gptutor.errors import ApiError
from gptutor.http.middlewares import Handler
from gptutor.http.rate_limit import MINUTE_S, RateLimit
from gptutor.integrations.vk import ExpiredLaunch

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
ADDRESSES_MAX = 100_000
"""Beyond so many addresses in one minute, all further ones share a count."""
NEIGHBOURS_BITS = 64
"""An IPv6 caller has a whole network of addresses: they count as one."""


@dataclass(slots=True)
class RequestCounter:
    """Events of this minute, by address. `per_minute` 0 is no limit."""

    per_minute: int
    _minute: int = 0
    _counts: dict[str, int] = field(default_factory=dict)

    @property
    def has_any(self) -> bool:
        """Whether anything was counted in this minute; mostly not, and then nobody's address need be found out."""
        return bool(self._counts_now())

    def is_used_up(self, address: str) -> bool:
        """Nobody's address, behind a trusted proxy that does not tell, has no count."""
        return bool(self.per_minute and address) and self._counts_now().get(self._name(address), 0) >= self.per_minute

    def add(self, address: str) -> None:
        counts, name = self._counts_now(), self._name(address)
        counts[name] = counts.get(name, 0) + 1

    def _counts_now(self) -> dict[str, int]:
        minute = int(time.time()) // MINUTE_S
        if minute != self._minute:
            self._minute, self._counts = minute, {}
        return self._counts

    def _name(self, address: str) -> str:
        return address if len(self._counts) < ADDRESSES_MAX or address in self._counts else "others"


def limit_by_address(
    arrivals: Mapping[Any, RequestCounter], strangers: RequestCounter, guarded: Collection[Any], proxies: Sequence[Network]
) -> Middleware:
    """Counts every request of the handlers in `arrivals`, and those of `guarded` handlers that had no good key."""

    known = RecentCredentials()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        called = request.match_info.handler
        if (arriving := arrivals.get(called)) is not None:
            address = client_address(request, proxies)
            if arriving.is_used_up(address):
                raise RateLimit(arriving.per_minute).refusal()
            arriving.add(address)
        if called not in guarded:
            return await handler(request)
        key = credential_hash(request)
        if strangers.has_any and key not in known and strangers.is_used_up(client_address(request, proxies)):
            raise RateLimit(strangers.per_minute).refusal()
        try:
            response = await handler(request)
        except ApiError as refusal:
            if refusal.code == "invalid_key" and not isinstance(refusal.__cause__, ExpiredLaunch):
                strangers.add(client_address(request, proxies))
            raise
        known.add(key)
        return response

    return middleware


class RecentCredentials:
    """Credentials that were good a while ago: where strangers are held off, their neighbours with a key are not.

    It opens nothing: whether a key is good is asked of the database each time.
    """

    def __init__(self) -> None:
        self._young: set[int] = set()
        self._old: set[int] = set()

    def add(self, key: int) -> None:
        if len(self._young) >= ADDRESSES_MAX:
            self._old, self._young = self._young, set()
        self._young.add(key)

    def __contains__(self, key: int) -> bool:
        return key in self._young or key in self._old


def credential_hash(request: web.Request) -> int:
    """A number for what stands in Authorization, by a hash of this process, from which nobody learns it."""
    return hash(request.headers.get("Authorization", ""))


def client_address(request: web.Request, proxies: Sequence[Network]) -> str:
    """The caller's; empty where only trusted proxies are known, and none of them says for whom it asks."""
    hops = [request.remote or "", *reversed(",".join(request.headers.getall("X-Forwarded-For", [])).split(","))]
    for hop in hops:
        try:
            parsed = ipaddress.ip_address(hop.strip())
        except ValueError:
            break  # what a trusted proxy did not write says nothing
        parsed = getattr(parsed, "ipv4_mapped", None) or parsed
        if not any(parsed in network for network in proxies):
            if isinstance(parsed, ipaddress.IPv6Address):
                return str(ipaddress.ip_network((parsed, NEIGHBOURS_BITS), strict=False))
            return str(parsed)
    return ""


def networks(text: str) -> list[Network]:
    """Addresses and networks, separated by spaces. Raises ValueError."""
    return [ipaddress.ip_network(name) for name in text.split()]
