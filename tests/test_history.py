"""Any history of accounts, batches, deaths and recoveries agrees with a model of it in plain Python, step by step, on a real PostgreSQL
(contract C2, C3, C5, C6, C9; rows money-3, money-7, db-5, process-1 to process-6, process-8)."""

import asyncio
import os
import shutil
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from gptutor.database import pool
from gptutor.money.amounts import Nano, parse_roubles
from gptutor.money.bookings import Bookings
from gptutor.money.holds import HandOver, HoldId, HoldRequest, InsufficientFunds, Release, Settlement, new_id
from gptutor.money.invariants import check
from gptutor.money.journal import Journal, read_journals
from gptutor.money.ledger import Ledger
from gptutor.money.pricing import Ceiling, Charge
from gptutor.money.recovery import Recovery
from tests.support.gateway import Client, make_client
from tests.support.ledger import RATE, claim

ACCOUNTS = 2
COSTS = st.integers(0, 60).map(lambda cents: Decimal(cents) / 100)


@dataclass
class Modelled:
    """A hold, as the model sees it."""

    account: int
    amount: Decimal
    hold_id: HoldId
    state: str = "open"
    sent: bool = False
    name: str | None = None
    cost: Decimal | None = None  # as it was seen passing by
    handed_over: bool = False


class History(RuleBasedStateMachine):
    url: ClassVar[str]
    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.stack = AsyncExitStack()
        self.slot = Path(tempfile.mkdtemp(prefix="gptutor-history-")) / "0"
        self.slot.mkdir()
        self.balance = [Decimal(100)] * ACCOUNTS
        self.known: dict[HoldId, Modelled] = {}
        self.openrouter: dict[str, Decimal] = {}  # what /generation would say

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    @initialize()
    def begin(self) -> None:
        async def connect() -> None:
            self.database = await self.stack.enter_async_context(pool.open_database(self.url, connections_max=4))
            self.clients: list[Client] = [await make_client(self.database, "100") for _ in range(ACCOUNTS)]
            # What earlier histories left open must not take up this one's looks.
            await self.execute("UPDATE holds SET due_at = 'infinity' WHERE state = 'open'")

        self.do(connect())
        self.live()

    def live(self) -> None:
        """A new process, on the same slot."""
        self.journal = Journal(self.slot, 400, 1 << 20)  # segments so small that they change all the time
        self.ledger = Ledger(self.database, self.journal, rub_per_usd=RATE, hold_ttl_s=3600)
        self.recovery = Recovery(
            self.database, self.ledger, self.slot.parent, self.cost_of, poll_s=1, lookup_interval_max_s=600, give_up_s=86_400
        )

    async def cost_of(self, name: str) -> Decimal | None:
        return self.openrouter.get(name)

    def available(self, account: int) -> Decimal:
        held = sum(hold.amount for hold in self.known.values() if hold.account == account and hold.state == "open")
        return self.balance[account] - held

    def settled(self, hold: Modelled, cost: Decimal) -> None:
        if hold.state != "settled":
            hold.state = "settled"
            self.balance[hold.account] -= cost * RATE

    @rule(target=holds, wishes=st.lists(st.tuples(st.integers(0, ACCOUNTS - 1), st.integers(0, 40)), min_size=1, max_size=6))
    def hold_many_at_once(self, wishes: list[tuple[int, int]]) -> Any:
        async def hold(account: int, amount: int) -> Modelled | None:
            nano = Nano(amount * 10**9)
            request = HoldRequest(claim(self.clients[account]), new_id(), Ceiling(hold_max=nano, available_min=nano), "a/b", "r")
            try:
                granted = await self.ledger.hold_funds(request)
            except InsufficientFunds:
                return None
            return Modelled(account, Decimal(amount), granted.hold_id)

        async def together() -> list[Modelled | None]:
            return await asyncio.gather(*(hold(account, amount) for account, amount in wishes))

        granted = []
        for (account, amount), made in zip(wishes, self.do(together()), strict=True):
            assert (made is not None) == (self.available(account) >= amount)  # in the order of arrival
            if made is not None:
                self.known[made.hold_id] = made
                granted.append(made)
        return multiple(*granted)

    @rule(account=st.integers(0, ACCOUNTS - 1), amount=st.integers(1, 50))
    def top_up(self, account: int, amount: int) -> None:
        self.do(Bookings(self.database).book(self.clients[account].account_id, "topup", parse_roubles(str(amount))))
        self.balance[account] += amount

    @rule(hold=holds, cost=st.one_of(st.none(), COSTS))
    def send(self, hold: Modelled, cost: Decimal | None) -> None:
        """The request goes upstream, gets a name, and OpenRouter may know its price at once or never."""
        if self.mine(hold) and not hold.sent:
            self.journal.record_sent(self.clients[hold.account].account_id, hold.hold_id)
            hold.sent = True
            if cost is not None:
                hold.name = f"gen-{hold.hold_id}"
                self.openrouter[hold.name] = cost
                self.journal.record_generation_id(hold.hold_id, hold.name)

    @rule(hold=holds)
    def see_the_price(self, hold: Modelled) -> None:
        if self.mine(hold) and hold.name is not None and hold.cost is None:
            hold.cost = self.openrouter[hold.name]
            self.journal.record_charge(hold.hold_id, self.charge(hold.cost), hold.name)

    @rule(hold=holds, cost=COSTS, times=st.integers(1, 3))
    def settle(self, hold: Modelled, cost: Decimal, times: int) -> None:
        """Also again, also after a release: late evidence charges, once."""
        cost = hold.cost if hold.cost is not None else self.openrouter.get(hold.name or "", cost)
        item = Settlement(
            self.clients[hold.account].account_id, hold.hold_id, self.charge(cost), hold.name or f"gen-{hold.hold_id}"
        )

        async def together() -> list[str]:
            return await asyncio.gather(*(self.ledger.settle(item) for _ in range(times)))

        outcomes = self.do(together())
        expected = {"open": "settled", "released": "settled_late", "settled": "already_settled"}[hold.state]
        assert set(outcomes) <= {expected, "already_settled"}
        assert (expected in outcomes) or expected == "already_settled"
        self.ledger.deactivate(hold.hold_id)
        self.settled(hold, cost)

    @rule(hold=holds)
    def release(self, hold: Modelled) -> None:
        if not hold.sent:
            self.do(self.ledger.release(Release(self.clients[hold.account].account_id, hold.hold_id)))
            self.ledger.deactivate(hold.hold_id)
            hold.state = "released" if hold.state == "open" else hold.state

    @rule(hold=holds)
    def hand_over(self, hold: Modelled) -> None:
        if self.mine(hold) and hold.sent and hold.cost is None:
            self.do(self.ledger.hand_over(HandOver(self.clients[hold.account].account_id, hold.hold_id, hold.name)))
            self.ledger.deactivate(hold.hold_id)
            hold.handed_over = True

    @rule(hold=consumes(holds))
    def break_off(self, hold: Modelled) -> None:
        """Its exchange ends without a word."""
        self.ledger.deactivate(hold.hold_id)

    @rule(tear=st.booleans())
    def die(self, tear: bool) -> None:
        """The process is killed, perhaps in the middle of a line; another starts on its slot."""
        os.close(self.journal._file)
        if tear:
            with self.journal._path.open("ab") as file:
                file.write(b"0123abcd named 1 ")
        self.live()
        for leftover in read_journals(self.slot):
            if leftover.owner != self.journal.owner:
                self.do(self.recovery.replay(leftover))
        for hold in self.known.values():
            if hold.state == "open" and not hold.handed_over:
                if hold.cost is not None:
                    self.settled(hold, hold.cost)
                elif hold.sent:
                    hold.handed_over = True
                else:
                    hold.state = "released"

    @rule()
    def recover(self) -> None:
        """Recovery looks, and all that waits is due."""
        broken_off = [hold for hold in self.known.values() if self.mine(hold) and hold.hold_id not in self.ledger.active]
        for hold in broken_off:
            if hold.cost is not None:
                self.settled(hold, hold.cost)
            elif hold.sent:
                hold.handed_over = True
        for _ in range(2):  # what was handed over by the first look is looked at by the second
            self.do(self.make_due())
            while self.do(self.recovery.process_due_holds()):
                pass  # a claim has a bound
        for hold in self.known.values():
            if hold.state == "open" and hold.handed_over and hold.name is not None:
                self.settled(hold, self.openrouter[hold.name])
            elif hold in broken_off and hold.state == "open" and not hold.sent:
                hold.state = "released"

    async def make_due(self) -> None:
        accounts = ", ".join(str(client.account_id) for client in self.clients)
        await self.execute(
            f"UPDATE holds SET due_at = now() - interval '1 second' WHERE state = 'open' AND account_id IN ({accounts})"
        )

    async def execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self.url)
        await connection.execute(statement)
        await connection.close()

    def mine(self, hold: Modelled) -> bool:
        """Whether the living process has it in its hands, or had."""
        return hold.state == "open" and not hold.handed_over

    def charge(self, cost: Decimal) -> Charge:
        return Charge(Nano(int(cost * RATE * 10**9)), cost)

    @invariant()
    def the_books_agree(self) -> None:
        if hasattr(self, "database"):
            for account, client in enumerate(self.clients):
                user = self.do(client.user())
                assert Decimal(user.balance) / 10**9 == self.balance[account]
                assert Decimal(user.available) / 10**9 == self.available(account)

    def teardown(self) -> None:
        async def end() -> list[str]:
            findings = [finding.invariant.name async for finding in check(self.database) if finding.rows]
            await self.stack.aclose()
            return [name for name in findings if not name.startswith(("09_", "10_"))]  # time was turned forward by hand

        try:
            if hasattr(self, "database"):
                assert self.do(end()) == []
        finally:
            self.loop.close()
            shutil.rmtree(self.slot.parent)


@pytest.mark.timeout(300)
def test_any_history_of_deaths_and_recoveries_agrees_with_a_model_of_it(database_url: str) -> None:
    History.url = database_url
    run_state_machine_as_test(
        History,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[
                Phase.explicit,
                Phase.reuse,
                Phase.generate,
            ],  # a history is readable as it is; making it shorter takes minutes
        ),
    )
