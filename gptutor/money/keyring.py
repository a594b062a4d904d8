"""The keys of an account: made, shown again, limited, replaced, revoked. The typed doors of `sql/queries/keys.sql`.

An account has one main key, the one that a sign-in shows, and any number of others, each with a name, and if its owner wants with
an end, a cap on what it may spend and a pace. The limits are kept by the hold statement itself, so they hold in every process.
"""

import datetime
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal

from gptutor.database.pool import Database, Row
from gptutor.money.amounts import AccountId, Nano
from gptutor.money.keys import KeyClaim, hash_key, make_key, shown
from gptutor.money.vault import Sealed, Unreadable, Vault

CapPeriod = Literal["day", "total"]
KEYS_MAX = 100
"""Of one account, revoked ones not counted."""
REKEY_PAGE = 500


class NoSuchKey(LookupError):
    """The account has no living key of this number."""


class TooManyKeys(Exception):
    """The account has as many keys as it may have."""


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a key may do: until when, for how much in which period, how often in a minute. None: no limit of its own."""

    expires_at: datetime.datetime | None = None
    cap: Nano | None = None
    cap_period: CapPeriod | None = None
    per_minute: int | None = None


NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it may be shown; `spent` and `held` are counted for keys with a cap, in its period."""

    key_id: int
    shown: str
    name: str
    is_main: bool
    limits: KeyLimits
    spent: Nano
    held: Nano
    created_at: datetime.datetime
    revoked_at: datetime.datetime | None


@dataclass(frozen=True, slots=True)
class LiveKey:
    """A key that opens its account."""

    key_id: int
    is_main: bool


class KeyRing:
    def __init__(self, database: Database, vault: Vault) -> None:
        self._database = database
        self._vault = vault

    async def issue(
        self, account_id: AccountId, name: str = "", limits: KeyLimits = NO_LIMITS, *, beside: bool = False
    ) -> tuple[str, Key]:
        """A new key. Where there is no main key it becomes that, unless it has limits or is to stand `beside` one.

        Raises TooManyKeys, NoSuchUser's constraint.
        """
        key = make_key(account_id)
        key_hash = hash_key(key)
        sealed = self._vault.seal(account_id, key_hash, key)
        row = await self._database.fetchrow(
            "create_key",
            account_id,
            beside or limits != NO_LIMITS,
            KEYS_MAX,
            key_hash,
            shown(key),
            name,
            sealed.data,
            sealed.secret_id,
            *_columns_of(limits),
        )
        if row is None:
            raise TooManyKeys
        return key, key_of(row)

    async def renew(self, account_id: AccountId, *, others_too: bool = False) -> str:
        """A new main key in place of the one before, or of all: those are dead from now on."""
        key, _ = await self._renew(account_id, others_too=others_too)
        return key

    async def main(self, account_id: AccountId) -> str:
        """The main key, to be shown. One that has no copy, has ended or was revoked is replaced by a new one.

        Raises Unreadable: a copy that does not open says that the secret is a wrong one, and a key that works must not die of it.
        """
        while True:
            row = await self._database.fetchrow("find_main_key", account_id)
            if row is not None and row["encrypted_key"] is not None and not row["is_expired"]:
                return self._vault.open(account_id, row["key_hash"], Sealed(row["encrypted_key"], row["secret_id"]))
            key, is_new = await self._renew(account_id, only_seen=True, seen=row["key_hash"] if row is not None else None)
            if is_new:  # otherwise another request was first, and its key is the one to show
                return key

    async def _renew(
        self, account_id: AccountId, *, others_too: bool = False, only_seen: bool = False, seen: bytes | None = None
    ) -> tuple[str, bool]:
        """A new main key, and whether it took the place of the one before; with `only_seen` it does so only of the one `seen`."""
        key = make_key(account_id)
        key_hash = hash_key(key)
        sealed = self._vault.seal(account_id, key_hash, key)
        (row,) = await self._database.fetch(
            "replace_main_key", account_id, others_too, only_seen, seen, key_hash, shown(key), sealed.data, sealed.secret_id
        )
        return key, row["is_new"]

    async def list(self, account_id: AccountId) -> list[Key]:
        """Newest first, revoked ones included."""
        return [key_of(row) for row in await self._database.fetch("list_keys", account_id)]

    async def limit(self, account_id: AccountId, key_id: int, limits: KeyLimits) -> Key:
        """Sets all limits of a key; a cap of a new period counts from now on. Raises NoSuchKey."""
        await self._limit(account_id, key_id, limits)
        return await self.find(account_id, key_id)

    async def change(self, account_id: AccountId, key_id: int, change: Callable[[KeyLimits], KeyLimits]) -> Key:
        """Changes some limits, whatever others are changed at the same moment. Raises NoSuchKey, and what `change` does."""
        while True:
            seen = (await self.find(account_id, key_id)).limits
            if await self._limit(account_id, key_id, change(seen), seen):
                return await self.find(account_id, key_id)

    async def _limit(self, account_id: AccountId, key_id: int, limits: KeyLimits, seen: KeyLimits | None = None) -> bool:
        """False: they are not those `seen` any more, and nothing was done. Raises NoSuchKey."""
        before = seen or NO_LIMITS
        (row,) = await self._database.fetch(
            "set_key_limits",
            account_id,
            key_id,
            *_columns_of(limits),
            seen is not None,
            *_columns_of(before),
        )
        if row["outcome"] == "not_found":
            raise NoSuchKey(key_id)
        return bool(row["outcome"] == "done")

    async def revoke(self, account_id: AccountId, key_id: int) -> None:
        """Takes effect with the next request, in every process. Raises NoSuchKey."""
        if await self._database.fetchrow("revoke_key", account_id, key_id) is None:
            raise NoSuchKey(key_id)

    async def is_alive(self, claim: KeyClaim) -> bool:
        """Whether the key is known, and neither it nor its account is out of use."""
        return await self.opened_by(claim) is not None

    async def opened_by(self, claim: KeyClaim) -> LiveKey | None:
        """The key, if it is known, and neither it nor its account is out of use."""
        row = await self._database.fetchrow("find_live_key", claim.account_id, claim.key_hash)
        return None if row is None else LiveKey(row["key_id"], row["is_main"])

    async def find(self, account_id: AccountId, key_id: int) -> Key:
        """A key, revoked or not. Raises NoSuchKey."""
        row = await self._database.fetchrow("find_key", account_id, key_id)
        if row is None:
            raise NoSuchKey(key_id)
        return key_of(row)

    async def stale_copies(self) -> int:
        """How many copies `rekey` has before it."""
        row = await self._database.fetchrow("count_keys_to_rekey", self._vault.secret_id)
        return row["keys"] if row else 0

    async def rekey(self) -> AsyncIterator[tuple[int, int]]:
        """Seals every copy anew with the first secret; may be broken off and resumed. Yields (done, unreadable) after a page."""
        done = unreadable = 0
        account_id = key_id = 0
        while rows := await self._database.fetch("list_keys_to_rekey", self._vault.secret_id, account_id, key_id, REKEY_PAGE):
            for row in rows:
                account_id, key_id = row["account_id"], row["key_id"]
                try:
                    key = self._vault.open(AccountId(account_id), row["key_hash"], Sealed(row["encrypted_key"], row["secret_id"]))
                except Unreadable:
                    unreadable += 1
                    continue
                sealed = self._vault.seal(AccountId(account_id), row["key_hash"], key)
                await self._database.fetch(
                    "set_encrypted_key", account_id, key_id, row["secret_id"], sealed.data, sealed.secret_id
                )
                done += 1
            yield done, unreadable


def _columns_of(limits: KeyLimits) -> tuple[Any, ...]:
    """limit_nano, limit_reset, requests_per_minute, expires_at."""
    reset = "daily" if limits.cap_period == "day" else None
    return limits.cap, reset, limits.per_minute, limits.expires_at


def _limits_of(row: Row) -> KeyLimits:
    period: CapPeriod | None = None
    if row["limit_nano"] is not None:
        period = "day" if row["limit_reset"] == "daily" else "total"
    return KeyLimits(row["expires_at"], row["limit_nano"], period, row["requests_per_minute"])


def key_of(row: Row) -> Key:
    return Key(
        key_id=row["key_id"],
        shown=row["prefix"],
        name=row["name"],
        is_main=row["is_main"],
        limits=_limits_of(row),
        spent=Nano(row["spent_nano"]),
        held=Nano(row["held_nano"]),
        created_at=row["created_at"],
        revoked_at=row["revoked_at"],
    )
