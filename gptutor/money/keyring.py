"""The API keys of an account: create, show again, limit, replace, revoke. The typed functions of `sql/queries/keys.sql`.

An account has one main key, which signing in shows, and any number of others. Each key has a name and optional limits: an expiry
time, a spending limit and a number of requests per minute. The hold statement enforces them, so they apply in every process.
"""

import datetime
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal

from gptutor.database.pool import Database, Row
from gptutor.money.amounts import AccountId, Nano
from gptutor.money.keys import KeyClaim, display_prefix, hash_key, make_key
from gptutor.money.vault import DecryptionFailed, EncryptedKey, Vault

LimitReset = Literal["daily"]
"""How often the spending counted against a limit starts from zero; None: never."""
KEYS_MAX = 100
"""For one account, without revoked keys."""
REKEY_PAGE = 500


class NoSuchKey(LookupError):
    """The account has no valid key with this id."""


class TooManyKeys(Exception):
    """The account already has KEYS_MAX keys."""


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a key may do beyond the limits of its account. None: the key has no such limit.

    `limit` is the most that the key may spend, in nano-roubles; `limit_reset` is None where there is no `limit`.
    """

    expires_at: datetime.datetime | None = None
    limit: Nano | None = None
    limit_reset: LimitReset | None = None
    requests_per_minute: int | None = None


NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret. `spent` and `held` are counted only for keys with a spending limit, within its period."""

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
    """A key that authenticates its account, and what the account has available."""

    key_id: int
    is_main: bool
    available: Nano


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that is not yet in the database, and what is stored of it."""

    key: str
    key_hash: bytes
    prefix: str
    encrypted: EncryptedKey


class KeyRing:
    def __init__(self, database: Database, vault: Vault) -> None:
        self._database = database
        self._vault = vault

    def make(self, account_id: AccountId) -> NewKey:
        """A key that is not stored yet. Raises what the vault raises if there is no secret."""
        key = make_key(account_id)
        key_hash = hash_key(key)
        return NewKey(key, key_hash, display_prefix(key), self._vault.encrypt(account_id, key_hash, key))

    async def issue(
        self, account_id: AccountId, name: str = "", limits: KeyLimits = NO_LIMITS, *, beside: bool = False
    ) -> tuple[str, Key]:
        """Creates a key. It becomes the main key if there is none, unless the key has limits or `beside` is set.

        Raises TooManyKeys, and ConstraintViolated if the account does not exist.
        """
        new = self.make(account_id)
        row = await self._database.fetchrow(
            "create_key",
            account_id,
            beside or limits != NO_LIMITS,
            KEYS_MAX,
            new.key_hash,
            new.prefix,
            name,
            new.encrypted.data,
            new.encrypted.secret_id,
            *_columns_of(limits),
        )
        if row is None:
            raise TooManyKeys
        return new.key, key_of(row)

    async def renew(self, account_id: AccountId, *, others_too: bool = False) -> str:
        """Replaces the main key, or all keys if `others_too`: the replaced keys are revoked at once."""
        key, _ = await self._renew(account_id, others_too=others_too)
        return key

    async def main(self, account_id: AccountId) -> str:
        """The main key, to be shown. A key without an encrypted copy, or an expired or revoked one, is replaced by a new key.

        Raises DecryptionFailed: the configured secret is wrong, and a key that works must not be revoked because of that.
        """
        while True:
            row = await self._database.fetchrow("find_main_key", account_id)
            if row is not None and row["encrypted_key"] is not None and not row["is_expired"]:
                return self._vault.decrypt(account_id, row["key_hash"], EncryptedKey(row["encrypted_key"], row["secret_id"]))
            key, is_new = await self._renew(account_id, only_seen=True, seen=row["key_hash"] if row is not None else None)
            if is_new:  # otherwise another request replaced it first: show that key
                return key

    async def _renew(
        self, account_id: AccountId, *, others_too: bool = False, only_seen: bool = False, seen: bytes | None = None
    ) -> tuple[str, bool]:
        """A new main key, and whether it replaced the old one. With `only_seen` only the key with the hash `seen` is replaced."""
        new = self.make(account_id)
        (row,) = await self._database.fetch(
            "replace_main_key",
            account_id,
            others_too,
            only_seen,
            seen,
            new.key_hash,
            new.prefix,
            new.encrypted.data,
            new.encrypted.secret_id,
        )
        return new.key, row["is_new"]

    async def list(self, account_id: AccountId) -> list[Key]:
        """Newest first, revoked ones included."""
        return [key_of(row) for row in await self._database.fetch("list_keys", account_id)]

    async def limit(self, account_id: AccountId, key_id: int, limits: KeyLimits) -> Key:
        """Sets all limits of a key. A spending limit with a new period starts at zero now. Raises NoSuchKey."""
        await self._limit(account_id, key_id, limits)
        return await self.find(account_id, key_id)

    async def change(self, account_id: AccountId, key_id: int, change: Callable[[KeyLimits], KeyLimits]) -> Key:
        """Changes some limits; concurrent changes of other limits are kept. Raises NoSuchKey, and what `change` raises."""
        while True:
            seen = (await self.find(account_id, key_id)).limits
            if await self._limit(account_id, key_id, change(seen), seen):
                return await self.find(account_id, key_id)

    async def _limit(self, account_id: AccountId, key_id: int, limits: KeyLimits, seen: KeyLimits | None = None) -> bool:
        """Returns False, and changes nothing, if the limits are no longer those `seen`. Raises NoSuchKey."""
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
        """Whether the key exists and is not revoked or expired, and its account is active."""
        return await self.opened_by(claim) is not None

    async def opened_by(self, claim: KeyClaim) -> LiveKey | None:
        """The key, if it exists and is not revoked or expired, and its account is active."""
        row = await self._database.fetchrow("find_live_key", claim.account_id, claim.key_hash)
        return None if row is None else LiveKey(row["key_id"], row["is_main"], Nano(row["available_nano"]))

    async def find(self, account_id: AccountId, key_id: int) -> Key:
        """A key, revoked or not. Raises NoSuchKey."""
        row = await self._database.fetchrow("find_key", account_id, key_id)
        if row is None:
            raise NoSuchKey(key_id)
        return key_of(row)

    async def stale_copies(self) -> int:
        """How many copies `rekey` has left to encrypt."""
        row = await self._database.fetchrow("count_keys_to_rekey", self._vault.secret_id)
        return row["keys"] if row else 0

    async def rekey(self) -> AsyncIterator[tuple[int, int]]:
        """Encrypts every copy again, with the first secret; can be resumed. Yields (done, unreadable) after each page."""
        done = unreadable = 0
        account_id = key_id = 0
        while rows := await self._database.fetch("list_keys_to_rekey", self._vault.secret_id, account_id, key_id, REKEY_PAGE):
            for row in rows:
                account_id, key_id = row["account_id"], row["key_id"]
                try:
                    copy = EncryptedKey(row["encrypted_key"], row["secret_id"])
                    key = self._vault.decrypt(AccountId(account_id), row["key_hash"], copy)
                except DecryptionFailed:
                    unreadable += 1
                    continue
                encrypted = self._vault.encrypt(AccountId(account_id), row["key_hash"], key)
                await self._database.fetch(
                    "set_encrypted_key", account_id, key_id, row["secret_id"], encrypted.data, encrypted.secret_id
                )
                done += 1
            yield done, unreadable


def _columns_of(limits: KeyLimits) -> tuple[Any, ...]:
    """limit_nano, limit_reset, requests_per_minute, expires_at."""
    return limits.limit, limits.limit_reset, limits.requests_per_minute, limits.expires_at


def key_of(row: Row) -> Key:
    return Key(
        key_id=row["key_id"],
        shown=row["prefix"],
        name=row["name"],
        is_main=row["is_main"],
        limits=KeyLimits(row["expires_at"], row["limit_nano"], row["limit_reset"], row["requests_per_minute"]),
        spent=Nano(row["spent_nano"]),
        held=Nano(row["held_nano"]),
        created_at=row["created_at"],
        revoked_at=row["revoked_at"],
    )
