"""Accounts: `UserRepository`, the typed functions of `sql/queries/accounts.sql` and `identities.sql`."""

import datetime
import re
import sys
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

from gptutor.database.pool import Database, Row
from gptutor.money.amounts import AccountId, Nano, roubles
from gptutor.money.holds import new_id
from gptutor.money.keyring import NewKey

PAGE = 500
NOTHING = Nano(0)
FOUND_MAX = 100
"""The most that a search finds."""
QUERY_CHARACTERS_MAX = 200
"""No name or contact has more."""
OBSTACLES = {
    "holds_open": "Requests of user {id} run, or their cost is not known yet. Deactivate the user, and erase them later",
    "payments_pending": "User {id} has payments that have not ended, and whose money may still arrive. Erase the user later",
    "balance_left": (
        "The balance of user {id} is {balance} roubles, and not 0. Book what you pay back as a refund, or erase the user with "
        "`forfeit`: then an adjustment sets it to 0"
    ),
}
"""Outcomes of erase_user → why the user is not erased, and what to do."""
KEY_PREFIX = re.compile(r"(sk-user-[0-9]+(?:-[a-z2-7]{0,4})?)[a-z2-7]*")


class NoSuchUser(LookupError):
    """No account has this id."""


class UserErased(Exception):
    """The user was erased, and cannot be changed any more; the text is a sentence."""


class NotErasable(Exception):
    """The user cannot be erased now; the text is a sentence that says what to do."""


@dataclass(frozen=True, slots=True)
class User:
    account_id: AccountId
    name: str
    contact: str
    note: str
    balance: Nano
    held: Nano
    is_active: bool
    created_at: datetime.datetime
    updated_at: datetime.datetime
    erased_at: datetime.datetime | None

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

    async def search(self, query: str, limit: int = FOUND_MAX) -> list[User]:
        """At most `limit` accounts by id: those with this id, VK id, API key or beginning of one, and those whose name and
        contact contain all words of the query at the beginning of their words."""
        number = query if query.isascii() and query.isdigit() and len(query) <= 18 else None
        key = KEY_PREFIX.fullmatch(query.rstrip("…"))
        rows = []
        if number is not None or key is not None:
            prefix = None if key is None else f"{key[1]}%"
            rows += await self._database.fetch("find_accounts", None if number is None else int(number), number, prefix, limit)
        if key is None and len(query) <= QUERY_CHARACTERS_MAX:
            rows += await self._database.fetch("find_accounts_by_words", query.split(), limit)
        found = {row["account_id"]: user_of(row) for row in rows}
        return [found[account_id] for account_id in sorted(found)[:limit]]

    async def count(self) -> int:
        """How many accounts there are, erased ones included."""
        (row,) = await self._database.fetch("count_accounts")
        return int(row["accounts"])

    async def find(self, account_id: AccountId) -> User:
        """Raises NoSuchUser."""
        return user_of(await self._database.fetchrow("find_account", account_id))

    async def all(self, after: int = 0, limit: int | None = None) -> AsyncIterator[User]:
        """Accounts with ids above `after`, by id, read in pages: all of them, or the first `limit`."""
        left = sys.maxsize if limit is None else limit
        while left and (users := await self.page(after, min(PAGE, left))):
            for user in users:
                yield user
            left -= len(users)
            after = users[-1].account_id

    async def page(self, after: int, limit: int) -> list[User]:
        """Accounts with ids above `after`, by id."""
        return [user_of(row) for row in await self._database.fetch("list_accounts", after, limit)]

    async def set_active(self, account_id: AccountId, active: bool) -> User:
        """Takes effect with the next request, in every process (contract D6). Raises NoSuchUser, UserErased."""
        return await self._changed(account_id, await self._database.fetchrow("set_account_active", account_id, active))

    async def describe(self, account_id: AccountId, *, name: str | None, contact: str | None, note: str | None) -> User:
        """Sets what is given of the three. Raises NoSuchUser, UserErased."""
        return await self._changed(
            account_id, await self._database.fetchrow("set_account_details", account_id, name, contact, note)
        )

    async def _changed(self, account_id: AccountId, row: Row | None) -> User:
        """The account in the row of a change. Raises NoSuchUser and UserErased, if there is no row."""
        return user_of(row) if row is not None else require_not_erased(await self.find(account_id))

    async def erase(
        self, account_id: AccountId, *, forfeit: bool, entry_id: uuid.UUID, reason: str, booked_by: str
    ) -> tuple[bool, Nano]:
        """Removes what identifies the user, for good; the books stay. With `forfeit`, an adjustment by `booked_by`, with this id
        and reason, takes the balance. Whether the user was not erased before, and the balance that was forfeited.

        Raises NoSuchUser, NotErasable.
        """
        row = await self._database.fetchrow("erase_user", account_id, forfeit, entry_id, reason, booked_by)
        if row is None:
            raise NoSuchUser
        balance = Nano(row["balance_nano"])
        if sentence := OBSTACLES.get(row["outcome"]):
            raise NotErasable(sentence.format(id=account_id, balance=roubles(balance)))
        return row["outcome"] == "erased", balance


def require_not_erased(user: User) -> User:
    """Raises UserErased."""
    if user.erased_at is not None:
        raise UserErased(f"User {user.account_id} was erased on {user.erased_at:%Y-%m-%d}, for good; create a new user instead")
    return user


def user_of(row: Row | None) -> User:
    """The account in a row of an account statement. Raises NoSuchUser if there is no row."""
    if row is None:
        raise NoSuchUser
    return User(
        account_id=AccountId(row["account_id"]),
        name=row["name"],
        contact=row["contact"],
        note=row["note"],
        balance=Nano(row["balance_nano"]),
        held=Nano(row["held_nano"]),
        is_active=row["is_active"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        erased_at=row["erased_at"],
    )
