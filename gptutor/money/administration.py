"""What operators and administrators may change, and what a payment changes: each change leaves an audit line (contract C11, F10).

Used by the command line (`cli/`), the administrators' API (`admin/`) and payments (`api/payments.py`).
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

from gptutor.database.pool import Database
from gptutor.money.amounts import AccountId, InvalidAmount, Nano, roubles
from gptutor.money.bookings import CONTRA, Booking, Bookings, retry_lost_response
from gptutor.money.holds import new_id
from gptutor.money.key_limits import KeyLimitChanges, changed_limits
from gptutor.money.keyring import NO_LIMITS, Key, KeyLimits, KeyRing
from gptutor.money.records import key_limits_json
from gptutor.money.users import User, UserRepository, require_not_erased
from gptutor.money.vault import Vault
from gptutor.telemetry.logs import audit

BookingKind = Literal["topup", "refund", "adjustment", "bonus"]
REASON_MAX = 500
REFERENCE_MAX = 200
CONTACT_MAX = 200
NOTE_MAX = 500
FORFEITED = "the balance of an erased user"
"""The reason of the adjustment that takes it."""
INSTEAD = {"refund": "; a refund takes a positive amount from the balance"}
"""What to use instead of a negative amount, by kind of booking."""


class ReasonMissing(Exception):
    """An adjustment has no reason; the text is a sentence."""


def require_bookable(kind: BookingKind, amount: Nano) -> None:
    """Raises InvalidAmount for an amount that no booking of this kind may have."""
    if amount == 0 or (amount < 0 and kind != "adjustment"):
        needed = "other than zero" if kind == "adjustment" else "more than zero"
        instead = "" if amount == 0 else INSTEAD.get(kind, "; to take roubles, book a refund or a negative adjustment")
        raise InvalidAmount(f"The amount of a booking of kind {kind} must be {needed}, not {roubles(amount)}{instead}")


@dataclass(frozen=True, slots=True)
class UserDetails:
    """A user, their identities (provider and subject) and their keys."""

    user: User
    identities: list[tuple[str, str]]
    keys: list[Key]


class Bookkeeper:
    """Changes balances. `who` stands on the entries and in the audit lines: `cli:<os user>`, `admin:<token name>`, or a payment
    provider's name."""

    def __init__(self, database: Database, who: str) -> None:
        self.bookings = Bookings(database, who)
        self._who = who

    async def book(
        self, account_id: AccountId, kind: BookingKind, amount: Nano, *, reason: str = "", reference: str | None = None
    ) -> User:
        """Returns the user after the booking. `amount` is positive, except that an adjustment may be negative; a refund takes it.

        Raises NoSuchUser, AlreadyBooked, InvalidAmount, ReasonMissing, and Uncovered if a refund exceeds what is available.
        """
        require_bookable(kind, amount)
        if kind == "adjustment" and not reason.strip():
            raise ReasonMissing("An adjustment needs a reason")
        signed = Nano(-amount) if kind == "refund" else amount
        await self.bookings.book(account_id, kind, signed, reason=reason, reference=reference, covered=kind == "refund")
        self._audit_booking(kind, account_id, signed, reference, reason)
        return await self.bookings.user(account_id)

    async def pay(self, account_id: AccountId, amount: Nano, reference: str, reason: str) -> Booking:
        """Credits a payment, once however often its notification is repeated. Raises NoSuchUser, InvalidAmount, AlreadyBooked."""
        return await self._once(account_id, "topup", amount, reference, reason)

    async def pay_back(self, account_id: AccountId, amount: Nano, reference: str, reason: str) -> Booking:
        """Debits a refund that the provider has already paid out, once. Raises NoSuchUser, AlreadyBooked."""
        return await self._once(account_id, "refund", Nano(-amount), reference, reason)

    async def _once(
        self, account_id: AccountId, kind: Literal["topup", "refund"], signed: Nano, reference: str, reason: str
    ) -> Booking:
        booking, is_new = await self.bookings.book_once(account_id, kind, signed, reference=reference, reason=reason)
        if is_new:
            self._audit_booking(kind, account_id, signed, reference, reason)
        return booking

    def _audit_booking(self, kind: BookingKind, account_id: AccountId, signed: Nano, reference: str | None, reason: str) -> None:
        audit(self._who, kind, user_id=account_id, amount_rub=roubles(signed), reference=reference, reason=reason)


class Administration(Bookkeeper):
    """Changes users and their keys as well."""

    def __init__(self, database: Database, vault: Vault, who: str) -> None:
        super().__init__(database, who)
        self.users = UserRepository(database)
        self._keys = KeyRing(database, vault)

    async def user_details(self, account_id: AccountId) -> UserDetails:
        """Raises NoSuchUser."""
        user = await self.users.find(account_id)
        return UserDetails(user, await self.users.identities(account_id), await self._keys.list(account_id))

    async def create_user(self, name: str, balance: Nano) -> tuple[User, str]:
        """The new user and their main key, which is shown only now. All in one transaction; the key is encrypted before it.

        Raises InvalidAmount, and what the vault raises if there is no secret.
        """
        if balance:
            require_bookable("topup", balance)
        account_id, entry_id, reason = await self.users.next_id(), new_id(), "initial balance"
        key = self._keys.make(account_id)
        key_id = await retry_lost_response(
            lambda: self.users.create_whole(account_id, name, entry_id, balance, CONTRA["topup"], reason, self._who, key)
        )
        audit(self._who, "create user", user_id=account_id)
        if balance:
            self._audit_booking("topup", account_id, balance, None, reason)
        audit(self._who, "issue key", user_id=account_id, key_id=key_id, limits=key_limits_json(NO_LIMITS))
        return await self.bookings.user(account_id), key.key

    async def describe_user(
        self, account_id: AccountId, *, name: str | None = None, contact: str | None = None, note: str | None = None
    ) -> User:
        """Sets what is given. The audit line has no values: it must not outlive them. Raises NoSuchUser, UserErased."""
        user = await self.users.describe(account_id, name=name, contact=contact, note=note)
        given = {"name": name, "contact": contact, "note": note}
        audit(self._who, "describe user", user_id=account_id, fields=[field for field, text in given.items() if text is not None])
        return user

    async def erase_user(self, account_id: AccountId, *, forfeit: bool = False) -> User:
        """Removes what identifies the user, revokes all keys and deactivates the account, for good; entries and requests stay.
        Erasing again changes nothing. With `forfeit`, an adjustment takes a balance that is left.

        Raises NoSuchUser, NotErasable.
        """
        entry_id = new_id()
        attempts = 0

        async def erase() -> tuple[bool, Nano]:
            nonlocal attempts
            attempts += 1
            return await self.users.erase(account_id, forfeit=forfeit, entry_id=entry_id, reason=FORFEITED, booked_by=self._who)

        is_new, balance = await retry_lost_response(erase)
        if is_new or attempts > 1:  # the response to the first attempt may have been lost, and its audit line with it
            if balance:
                self._audit_booking("adjustment", account_id, Nano(-balance), None, FORFEITED)
            audit(self._who, "erase user", user_id=account_id)
        return await self.bookings.user(account_id)

    async def set_active(self, account_id: AccountId, active: bool) -> User:
        """Raises NoSuchUser, UserErased."""
        user = await self.users.set_active(account_id, active)
        audit(self._who, "activate" if active else "deactivate", user_id=account_id)
        return user

    async def issue_key(self, account_id: AccountId, name: str, limits: KeyLimits = NO_LIMITS) -> tuple[str, Key]:
        """The secret key, which is shown only now, and its record. Raises NoSuchUser, UserErased, TooManyKeys."""
        require_not_erased(await self.users.find(account_id))
        secret, key = await self._keys.issue(account_id, name, limits)
        audit(self._who, "issue key", user_id=account_id, key_id=key.key_id, limits=key_limits_json(key.limits))
        return secret, key

    async def rotate_keys(self, account_id: AccountId) -> str:
        """Revokes all keys and returns a new main key. Raises NoSuchUser, UserErased."""
        require_not_erased(await self.users.find(account_id))
        secret = await self._keys.renew(account_id, others_too=True)
        audit(self._who, "rotate keys", user_id=account_id)
        return secret

    async def key(self, account_id: AccountId, key_id: int) -> Key:
        """Raises NoSuchKey."""
        return await self._keys.find(account_id, key_id)

    async def limit_key(self, account_id: AccountId, key_id: int, changes: KeyLimitChanges, limit_min: Nano) -> Key:
        """`limit_min` is the minimum balance. Raises NoSuchKey, InvalidLimit."""
        key = await self._keys.change(account_id, key_id, lambda limits: changed_limits(limits, changes, limit_min))
        audit(self._who, "limit key", user_id=account_id, key_id=key.key_id, limits=key_limits_json(key.limits))
        return key

    async def revoke_key(self, account_id: AccountId, key_id: int) -> Key:
        """Raises NoSuchKey."""
        await self._keys.revoke(account_id, key_id)
        key = await self._keys.find(account_id, key_id)
        audit(self._who, "revoke key", user_id=account_id, key_id=key.key_id)
        return key

    async def stale_copies(self) -> int:
        """How many encrypted copies of keys `rekey` has to encrypt again."""
        return await self._keys.stale_copies()

    async def rekey(self) -> AsyncIterator[tuple[int, int]]:
        """Encrypts every copy with the current secret; yields as KeyRing.rekey does."""
        async for done, unreadable in self._keys.rekey():
            yield done, unreadable
        audit(self._who, "rekey")
