"""Accounts: `UserRepository`, the typed functions of `sql/queries/accounts.sql` and `identities.sql`."""

import datetime
import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

from gptutor.database.pool import Database, Row
from gptutor.money.amounts import AccountId, Nano
from gptutor.money.holds import new_id
from gptutor.money.keyring import NewKey

PAGE = 500
NOTHING = Nano(0)
KEY_PREFIX = re.compile(r"(sk-user-[0-9]+(?:-[a-z2-7]{0,4})?)[a-z2-7]*")


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


class UserRepository:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, name: str = "") -> User:
        return user_of(await self._database.fetchrow("create_account", name))

    async def next_id(self) -> AccountId:
        """A number that no other account gets, for `create_whole`."""
        (row,) = await self._database.fetch("next_account_id")
        return AccountId(row["account_id"])

    async def create_whole(
        self,
        account_id: AccountId,
        name: str,
        entry_id: uuid.UUID,
        balance: Nano,
        contra: str,
        reason: str,
        booked_by: str,
        key: NewKey,
    ) -> int:
        """Creates an account, its first top-up (unless it is 0) and its main key in one transaction, and returns the key's id.

        May be repeated with the same arguments if the response was lost.
        """
        (row,) = await self._database.fetch(
            "create_user",
            account_id,
            name,
            entry_id,
            balance,
            contra,
            reason,
            booked_by,
            key.key_hash,
            key.prefix,
            key.encrypted.data,
            key.encrypted.secret_id,
        )
        return int(row["key_id"])

    async def of_person(self, provider: str, subject: str, *, name: str = "", bonus: Nano = NOTHING) -> tuple[User, bool]:
        """The account of an external identity, created at its first sign-in, with a bonus; and whether the account is new."""
        (row,) = await self._database.fetch("find_or_create_account", provider, subject, name, new_id(), bonus)
        return await self.find(AccountId(row["account_id"])), row["is_new"]

    async def find_person(self, provider: str, subject: str) -> User:
        """Raises NoSuchUser."""
        row = await self._database.fetchrow("find_identity", provider, subject)
        if row is None:
            raise NoSuchUser
        return await self.find(AccountId(row["account_id"]))

    async def identities(self, account_id: AccountId) -> list[tuple[str, str]]:
        """The external identities of the account: provider and subject."""
        return [(row["provider"], row["subject"]) for row in await self._database.fetch("list_identities", account_id)]

    async def search(self, query: str) -> list[User]:
        """Accounts found by account id, by VK id, or by an API key or its display prefix."""
        number = query if query.isascii() and query.isdigit() and len(query) <= 18 else None
        key = KEY_PREFIX.fullmatch(query.rstrip("…"))
        if number is None and key is None:
            return []
        rows = await self._database.fetch(
            "find_accounts", None if number is None else int(number), number, None if key is None else f"{key[1]}%"
        )
        return [user_of(row) for row in rows]

    async def find(self, account_id: AccountId) -> User:
        """Raises NoSuchUser."""
        return user_of(await self._database.fetchrow("find_account", account_id))

    async def all(self) -> AsyncIterator[User]:
        """Every account, by id, read in pages."""
        last = 0
        while users := await self.page(last, PAGE):
            for user in users:
                yield user
            last = users[-1].account_id

    async def page(self, after: int, limit: int) -> list[User]:
        """Accounts with ids above `after`, by id."""
        return [user_of(row) for row in await self._database.fetch("list_accounts", after, limit)]

    async def set_active(self, account_id: AccountId, active: bool) -> User:
        """Takes effect with the next request, in every process (contract D6). Raises NoSuchUser."""
        return user_of(await self._database.fetchrow("set_account_active", account_id, active))


def user_of(row: Row | None) -> User:
    """The account in a row of an account statement. Raises NoSuchUser if there is no row."""
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
