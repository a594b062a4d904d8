"""The simulator's own books: what OpenRouter would bill for everything it served, to compare with ours."""

from collections import OrderedDict
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

RECORDS_MAX = 100_000


@dataclass(slots=True)
class Record:
    """One generation. `body` is the request exactly as it arrived; `headers` are the names and values beside it."""

    generation_id: str
    model: str
    stream: bool
    body: bytes
    headers: dict[str, str]
    created: float
    prompt_tokens: int = 0
    completion_tokens: int = 0
    fee_usd: Decimal = Decimal(0)
    """What OpenRouter charges: everything, or its fee alone where a provider's own key is used."""
    provider_usd: Decimal = Decimal(0)
    """What the provider bills to a key of its own."""
    is_byok: bool = False
    finished: bool = False
    cancelled: bool = False
    known_at: float = 0
    """When `/generation` begins to know it, in the event loop's time."""

    @property
    def cost_usd(self) -> Decimal:
        """All that the generation costs its buyer."""
        return self.fee_usd + self.provider_usd

    def stats(self) -> dict[str, Any]:
        """As `GET /generation` tells it."""
        return {
            "id": self.generation_id,
            "model": self.model,
            "streamed": self.stream,
            "cancelled": self.cancelled,
            "is_byok": self.is_byok,
            "total_cost": self.fee_usd,
            "usage": self.fee_usd,
            "upstream_inference_cost": self.provider_usd if self.is_byok else 0,
            "provider_name": "Simulator",
            "created_at": self.created,
            "tokens_prompt": self.prompt_tokens,
            "tokens_completion": self.completion_tokens,
            "native_tokens_prompt": self.prompt_tokens,
            "native_tokens_completion": self.completion_tokens,
            "finish_reason": "stop",
        }


class BillingRecords:
    def __init__(self) -> None:
        self.records: OrderedDict[str, Record] = OrderedDict()

    def open(self, record: Record) -> None:
        self.records[record.generation_id] = record
        if len(self.records) > RECORDS_MAX:
            self.records.popitem(last=False)

    def total_usd(self) -> Decimal:
        return sum((record.cost_usd for record in self.records.values()), Decimal(0))

    def provider_usd(self) -> Decimal:
        return sum((record.provider_usd for record in self.records.values()), Decimal(0))
