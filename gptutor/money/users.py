"""Accounts and their keys: `UserRepository`, the typed doors of `sql/queries/accounts.sql`."""

import datetime
from collections.abc import AsyncIterator
from dataclasses import dataclass

from gptutor.database import Database, Row
from gptutor.money.amounts import AccountId, Nano
from gptutor.money.keys import KeyClaim, hash_key, make_key, shown

PAGE = 500


class NoSuchUser(LookupError):
    """No account has this id."""


@dataclass(frozen=True, slots=True)
class User:
    account_id: AccountId
    name: str
    balance: Nano
    held: Nano
    is_active: bool
    created_at: datetime.datetime
    updated_at: datetime.datetime

    @property
    def available(self) -> Nano:
        return Nano(self.balance - self.held)


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it may be shown; the key itself is known only at the moment it is made."""

    shown: str
    name: str
    created_at: datetime.datetime
    revoked_at: datetime.datetime | None


class UserRepository:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, name: str = "") -> User:
        return user_of(await self._database.fetchrow("create_account", name))

    async def find(self, account_id: AccountId) -> User:
        """Raises NoSuchUser."""
        return user_of(await self._database.fetchrow("find_account", account_id))

    async def all(self) -> AsyncIterator[User]:
        """Every account, by id, read in pages."""
        last = 0
        while rows := await self._database.fetch("list_accounts", last, PAGE):
            for row in rows:
                yield user_of(row)
            last = rows[-1]["account_id"]

    async def set_active(self, account_id: AccountId, active: bool) -> User:
        """Takes effect with the next request, in every process (contract D6). Raises NoSuchUser."""
        return user_of(await self._database.fetchrow("set_account_active", account_id, active))

    async def issue_key(self, account_id: AccountId, name: str = "") -> str:
        """A new key beside the others. It cannot be shown again."""
        key = make_key(account_id)
        await self._database.fetch("create_key", account_id, hash_key(key), shown(key), name)
        return key

    async def rotate_key(self, account_id: AccountId) -> str:
        """A new key; all others are dead from now on. Raises NoSuchUser."""
        await self.find(account_id)
        key = make_key(account_id)
        await self._database.fetch("replace_keys", account_id, hash_key(key), shown(key))
        return key

    async def is_alive(self, claim: KeyClaim) -> bool:
        """Whether the key is known and neither it nor its account is out of use."""
        return await self._database.fetchrow("find_live_key", claim.account_id, claim.key_hash) is not None

    async def keys(self, account_id: AccountId) -> list[Key]:
        rows = await self._database.fetch("list_keys", account_id)
        return [Key(row["shown"], row["name"], row["created_at"], row["revoked_at"]) for row in rows]


def user_of(row: Row | None) -> User:
    """The account of a row that an account statement returned; its *no row* means NoSuchUser."""
    if row is None:
        raise NoSuchUser
    return User(
        account_id=AccountId(row["account_id"]),
        name=row["name"],
        balance=Nano(row["balance_nano"]),
        held=Nano(row["held_nano"]),
        is_active=row["is_active"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )
