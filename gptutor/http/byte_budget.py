"""A budget of bytes that the process may keep in memory at a time: request bodies, or large plain responses (contract A8).

Each request has a share, which grows as its bytes arrive, and is released when they are no longer needed. An account may use a
part of the budget only, so that it cannot take everything from the others.
"""

from collections import Counter
from collections.abc import Hashable

ACCOUNT_DIVISOR = 4
"""An account may use this part of the budget: a quarter."""
FREE_BYTES = 64 * 1024
"""A response of this size is always kept, so that large ones never take the place of ordinary ones."""


class BudgetExceeded(Exception):
    """The bytes cannot be kept. `by_account`: the account has used up its own part; otherwise the budget is used up."""

    def __init__(self, *, by_account: bool) -> None:
        super().__init__()
        self.by_account = by_account


class TooLarge(Exception):
    """One response is larger than a response may be."""


class ByteBudget:
    """`bytes_max` in all; an account may have a quarter, but at least `account_bytes_min`."""

    def __init__(self, bytes_max: int, *, account_bytes_min: int = 0) -> None:
        self.bytes_max = bytes_max
        self._account_bytes_max = max(bytes_max // ACCOUNT_DIVISOR, account_bytes_min)
        self._by_account: Counter[Hashable] = Counter()
        self.used = 0

    def take_for(self, account: Hashable, size: int) -> None:
        """Raises BudgetExceeded."""
        if self._by_account[account] + size > self._account_bytes_max:
            raise BudgetExceeded(by_account=True)
        self._by_account[account] += size

    def give_back_for(self, account: Hashable, size: int) -> None:
        self._by_account[account] -= size
        if self._by_account[account] <= 0:
            del self._by_account[account]


class ResponseBytes:
    """Counts the bytes of one response that is kept in memory. The first FREE_BYTES are not counted for the budget."""

    __slots__ = ("_bytes_max", "_share", "_size")

    def __init__(self, budget: ByteBudget, account: Hashable, bytes_max: int) -> None:
        self._share = ByteShare(budget)
        self._share.charge_to(account)
        self._bytes_max = bytes_max
        self._size = 0

    def count(self, size: int) -> None:
        """Raises TooLarge, BudgetExceeded."""
        before, self._size = self._size, self._size + size
        if self._size > self._bytes_max:
            raise TooLarge
        if self._size > FREE_BYTES:
            self._share.grow(self._size - max(before, FREE_BYTES))

    def release(self) -> None:
        self._share.release()


class ByteShare:
    """What one request has of a budget. A share that is forgotten is released when it is deallocated."""

    __slots__ = ("_account", "_budget", "_size")

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._account: Hashable | None = None
        self._size = 0

    def charge_to(self, account: Hashable) -> None:
        """From here on all bytes of the share count for a verified account as well. Raises BudgetExceeded."""
        size = self._size
        if size:
            self.release()
        self._account = account
        if size:
            self.grow(size)

    def grow(self, size: int) -> None:
        """Raises BudgetExceeded, and takes nothing then."""
        budget = self._budget
        if budget.used + size > budget.bytes_max:
            raise BudgetExceeded(by_account=False)
        if self._account is not None:
            budget.take_for(self._account, size)
        budget.used += size
        self._size += size

    def release(self) -> None:
        size, self._size = self._size, 0
        self._budget.used -= size
        if self._account is not None and size:
            self._budget.give_back_for(self._account, size)

    def __del__(self) -> None:
        if self._size:
            self.release()
