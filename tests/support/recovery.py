"""Processes that recover, and processes that die."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from gptutor.database.pool import Database
from gptutor.money import journal
from gptutor.money.journal import Journal
from gptutor.money.ledger import Ledger
from gptutor.money.recovery import Recovery
from tests.support.ledger import RATE, ledger_of


@dataclass
class Generations:
    """OpenRouter's `/generation`: the cost of each generation id, and the ids that were looked up."""

    costs: dict[str, Decimal | Exception | None] = field(default_factory=dict)
    lookups: list[str] = field(default_factory=list)

    async def cost_of(self, generation_id: str) -> Decimal | None:
        self.lookups.append(generation_id)
        await asyncio.sleep(0)
        answer = self.costs.get(generation_id)
        if isinstance(answer, Exception):
            raise answer
        return answer


@dataclass
class Process:
    ledger: Ledger
    recovery: Recovery
    generations: Generations

    @property
    def journal(self) -> Journal:
        return self.ledger.journal


@contextlib.contextmanager
def process(
    database: Database, directory: Path, *, generations: Generations | None = None, rate: Decimal = RATE, poll_s: float = 0.01
) -> Iterator[Process]:
    """A living process: its slot is locked, and its recovery is run by the test."""
    generations = generations or Generations()
    with journal.opened(directory) as (own, _):
        ledger = Ledger(database, own, rub_per_usd=rate, hold_ttl_s=60)
        recovery = Recovery(
            database, ledger, directory, generations.cost_of, poll_s=poll_s, lookup_interval_max_s=600, give_up_s=86_400
        )
        yield Process(ledger, recovery, generations)


def mortal(database: Database, directory: Path, slot: int = 50) -> Ledger:
    """The ledger of a process that will die: its slot is not locked, and its journal is never closed."""
    (directory / str(slot)).mkdir(parents=True, exist_ok=True)
    return ledger_of(database, Journal(directory / str(slot), 1 << 20, 1 << 30))


def journals_in(directory: Path, slot: int = 50) -> list[journal.AbandonedJournal]:
    return journal.read_journals(directory / str(slot))
