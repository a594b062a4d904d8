"""Keys that the database verified lately, in the memory of this process.

The list authenticates nobody: the hold statement verifies the key of each completion. The list decides whether a request counts
for its account or for its key before the hold is placed, and saves a look-up where a key was verified a moment ago.
"""

import asyncio
import time

from gptutor.http.address_limits import ADDRESSES_MAX
from gptutor.money.keys import KeyClaim

UNKNOWN = "the key is unknown, revoked or expired, or its user is inactive"
"""The cause of a rejection by the database, which does not tell them apart."""

FRESH_S = 2.0
"""For so long a verified key is not looked up again before its body is read."""

REJECTION_S = 0.05
"""An unknown key is rejected this long after its look-up began, however long the look-up took: the look-up takes longer for an
account that exists, because the account's row is locked."""


async def hide_duration(started: float) -> None:
    """To be awaited before a key is rejected. `started`: when the look-up began, by `time.monotonic`."""
    await asyncio.sleep(max(0.0, started + REJECTION_S - time.monotonic()))


class VerifiedKeys:
    def __init__(self) -> None:
        self._verified_at: dict[bytes, float] = {}

    def add(self, claim: KeyClaim, *, is_fresh: bool = True) -> None:
        """`is_fresh` False: its next large body needs a look-up all the same, because the account may lack money."""
        if claim.key_hash not in self._verified_at and len(self._verified_at) >= ADDRESSES_MAX:
            self._verified_at.clear()
        self._verified_at[claim.key_hash] = time.monotonic() if is_fresh else float("-inf")

    def discard(self, claim: KeyClaim) -> None:
        """The database does not know the key, or not any more."""
        self._verified_at.pop(claim.key_hash, None)

    def is_fresh(self, claim: KeyClaim) -> bool:
        return time.monotonic() - self._verified_at.get(claim.key_hash, float("-inf")) < FRESH_S

    def counted_as(self, claim: KeyClaim) -> str | bytes:
        """What requests with this key are counted for: the account, if the key is known to be the account's, else the key alone.

        Otherwise a made-up key could use up the limit of the account that it names.
        """
        return str(claim.account_id) if claim.key_hash in self._verified_at else claim.key_hash
