"""What is known about one purchase, and how its hold is closed by that evidence.

Every piece of evidence is written to the journal before it is recorded here. So wherever the exchange is interrupted, by an
exception, a cancellation or the death of the process, the hold can be closed by what is known.
"""

from gptutor.money.holds import HandOver, Hold, Mark, Release, Settlement
from gptutor.money.ledger import Ledger
from gptutor.money.pricing import Charge, LLMCostEvaluate
from gptutor.openrouter.bill import Bill


class Purchase:
    def __init__(self, ledger: Ledger, evaluate: LLMCostEvaluate, hold: Hold) -> None:
        self.is_sent = False
        """Whether something may have been bought."""
        self.generation_id: str | None = None
        self.charge: Charge | None = None
        self._ledger = ledger
        self._evaluate = evaluate
        self._hold = hold
        self._outcome: str | None = None

    def mark_sent(self) -> None:
        """From here on something may be bought. Raises JournalError."""
        self._ledger.journal.record_sent(self._hold.account_id, self._hold.hold_id, self._hold.facts)
        self.is_sent = True

    def mark_not_sent(self) -> None:
        """The attempt bought nothing: if the process dies before the next one, recovery must find no purchase."""
        self._ledger.journal.record_closed([self._hold.hold_id])
        self.is_sent = False

    async def mark_outcome_unknown(self, body_hash: bytes) -> None:
        """A client that repeats the request would buy it again: the repeat will be rejected. Never raises."""
        await self._ledger.mark_outcome_unknown(Mark(self._hold.account_id, self._hold.hold_id, body_hash))

    def record_generation_id(self, generation_id: str | None) -> None:
        """The first generation id wins; None is ignored."""
        if self.generation_id is None and generation_id is not None:
            self.generation_id = generation_id
            self._ledger.journal.record_generation_id(self._hold.hold_id, generation_id)

    def record_bill(self, bill: Bill, generation_id: str | None) -> None:
        """`generation_id`, of the response's headers, precedes the bill's own; both are written in the bill's journal record."""
        self.generation_id = self.generation_id or generation_id or bill.generation_id
        self.charge = Charge(self._evaluate.charge(bill.cost_usd), bill.cost_usd, bill.prompt_tokens, bill.completion_tokens)
        self._ledger.journal.record_charge(self._hold.hold_id, self.charge, self.generation_id)

    async def close(self) -> str:
        """Closes the hold by evidence: settles a known charge, releases if nothing was bought, else hands over to recovery.

        Returns the outcome: settled, released, awaiting_evidence. A hold that is closed stays as it is.
        """
        if self._outcome is None:
            self._outcome = await self._close()
        return self._outcome

    async def _close(self) -> str:
        account_id, hold_id = self._hold.account_id, self._hold.hold_id
        if self.charge is not None:
            await self._ledger.settle(Settlement(account_id, hold_id, self.charge, self.generation_id, self._hold.facts))
            return "settled"
        if not self.is_sent:
            await self._ledger.release(Release(account_id, hold_id))
            return "released"
        await self._ledger.hand_over(HandOver(account_id, hold_id, self.generation_id, self._hold.facts))
        return "awaiting_evidence"
