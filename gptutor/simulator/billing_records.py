"""The bill of every generation that the simulator served, for comparison with GPTutor's ledger."""

from collections import OrderedDict
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

RECORDS_MAX = 100_000


@dataclass(slots=True)
class BillingRecord:
    """One generation. `body` and `headers` are the request exactly as it arrived, `created` is its Unix time."""

    generation_id: str
    model: str
    stream: bool
    body: bytes
    headers: dict[str, str]
    created: float
    prompt_tokens: int = 0
    completion_tokens: int = 0
    fee_usd: Decimal = Decimal(0)
    """What OpenRouter charges: everything, or only its fee if a provider key of the customer's own (BYOK) is used."""
    provider_usd: Decimal = Decimal(0)
    """What the provider charges on the customer's own key (BYOK)."""
    is_byok: bool = False
    finished: bool = False
    cancelled: bool = False
    available_at: float = 0
    """When `GET /generation` starts to return the record, on the clock of the event loop."""

    @property
    def cost_usd(self) -> Decimal:
        """The whole cost of the generation, OpenRouter's and the provider's."""
        return self.fee_usd + self.provider_usd

    def stats(self) -> dict[str, Any]:
        """The record as `GET /generation` returns it."""
        return {
            "id": self.generation_id,
            "api_type": "completions",
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
    """The latest RECORDS_MAX records, by generation id, in the order of their requests."""

    def __init__(self) -> None:
        self.records: OrderedDict[str, BillingRecord] = OrderedDict()

    def add(self, record: BillingRecord) -> None:
        self.records[record.generation_id] = record
        if len(self.records) > RECORDS_MAX:
            self.records.popitem(last=False)

    def total_usd(self) -> Decimal:
        return sum((record.cost_usd for record in self.records.values()), Decimal(0))

    def provider_usd(self) -> Decimal:
        return sum((record.provider_usd for record in self.records.values()), Decimal(0))
