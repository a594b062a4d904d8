"""How many connections clients may have, in all and from one address; what is kept for `/health` if descriptors run out; how
fast rejected bodies are read."""

import ipaddress
import resource
from collections import Counter
from collections.abc import Sequence

from gptutor.http.address_limits import Network, network_of

RESERVED_MAX = 32
RESERVED_PART = 8
"""An eighth of the file descriptors, but at most RESERVED_MAX, is not for ordinary connections."""
DISCARD_PAUSE_S = 0.05
"""Before the next part of a rejected body is read: about five megabytes a second …"""
DISCARDED_AT_FULL_SPEED = 4
"""… for so many connections at a time; more of them share that speed, so that a flood of large bodies costs little."""


def is_reserved(descriptor: int) -> bool:
    """Whether the descriptor is one of the last: the system gives out the lowest free number, so hardly any others are free."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit != resource.RLIM_INFINITY and descriptor >= limit - min(RESERVED_MAX, limit // RESERVED_PART)


class ConnectionLimits:
    """Shared by the connections of a listener. Connections of trusted proxies, and of Unix sockets, count in all only."""

    def __init__(self, *, connections_max: int, per_address_max: int, trusted_proxies: Sequence[Network]) -> None:
        self._connections_max = connections_max
        self._per_address_max = per_address_max
        self._trusted_proxies = trusted_proxies
        self._by_address: Counter[str] = Counter()
        self._count = 0
        self._discards = 0

    def add(self, host: str) -> bool:
        """Counts a connection from `host`, or returns False if there are too many."""
        address = self.address(host)
        if self._count >= self._connections_max or (address and self._by_address[address] >= self._per_address_max):
            return False
        self._count += 1
        if address:
            self._by_address[address] += 1
        return True

    def remove(self, host: str) -> None:
        self._count -= 1
        if address := self.address(host):
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def begin_discard(self) -> float:
        """The pause in seconds before a connection reads more of a body that is discarded. It ends with `end_discard`."""
        self._discards += 1
        return DISCARD_PAUSE_S * max(1, self._discards / DISCARDED_AT_FULL_SPEED)

    def end_discard(self) -> None:
        self._discards -= 1

    def address(self, host: str) -> str:
        """Empty for connections that are not counted by their address."""
        try:
            return network_of(ipaddress.ip_address(host), self._trusted_proxies)
        except ValueError:
            return ""
