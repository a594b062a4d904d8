"""What is known of one purchase under its hold, and how the hold is closed by it.

Everything that is learnt is in the journal a moment earlier than here. So wherever the exchange is broken off, by an exception, a
cancellation or the death of the process, closing the hold is a matter of reading what is known.
"""

from gptutor.money.holds import HandOver, Hold, Release, Settlement
from gptutor.money.ledger import Ledger
from gptutor.money.pricing import Charge, LLMCostEvaluate
from gptutor.openrouter.bill import Bill


class Purchase:
    def __init__(self, ledger: Ledger, evaluate: LLMCostEvaluate, hold: Hold) -> None:
        self.is_sent = False
        self.generation_id: str | None = None
        self.price: Charge | None = None
        self._ledger = ledger
        self._evaluate = evaluate
        self._hold = hold

    def send(self) -> None:
        """From here on something may be bought. Raises JournalError."""
        self._ledger.journal.record_sent(self._hold.account_id, self._hold.hold_id)
        self.is_sent = True

    def take_back(self) -> None:
        """OpenRouter's refusal proves that nothing was bought: a death before the next attempt must find it so."""
        self._ledger.journal.record_closed([self._hold.hold_id])
        self.is_sent = False

    def name(self, generation_id: str | None) -> None:
        if generation_id is not None:
            self.generation_id = generation_id
            self._ledger.journal.record_generation_id(self._hold.hold_id, generation_id)

    def note_bill(self, bill: Bill, name: str | None) -> None:
        """`name` is the answer's own, by its head; one whose bill comes at once was not named before."""
        self.generation_id = self.generation_id or name or bill.generation_id
        self.price = Charge(self._evaluate.charge(bill.cost_usd), bill.cost_usd, bill.prompt_tokens, bill.completion_tokens)
        self._ledger.journal.record_charge(self._hold.hold_id, self.price, self.generation_id)

    async def close(self) -> str:
        """By evidence: a bill is settled, a purchase that did not happen is released, and the rest is recovery's.

        Gives what became of it: settled, released, awaiting_evidence.
        """
        account_id, hold_id, price = self._hold.account_id, self._hold.hold_id, self.price
        if price is not None:
            await self._ledger.settle(Settlement(account_id, hold_id, price, self.generation_id))
            return "settled"
        if not self.is_sent:
            await self._ledger.release(Release(account_id, hold_id))
            return "released"
        await self._ledger.hand_over(HandOver(account_id, hold_id, self.generation_id))
        return "awaiting_evidence"
