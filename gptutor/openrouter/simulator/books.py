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
    cost_usd: Decimal = Decimal(0)
    finished: bool = False
    cancelled: bool = False
    known_at: float = 0
    """When `/generation` begins to know it, in the event loop's time."""

    def stats(self) -> dict[str, Any]:
        """As `GET /generation` tells it; the cost is put in by the server, which spells it."""
        return {
            "id": self.generation_id,
            "model": self.model,
            "streamed": self.stream,
            "cancelled": self.cancelled,
            "is_byok": False,
            "upstream_inference_cost": 0,
            "provider_name": "Simulator",
            "created_at": self.created,
            "tokens_prompt": self.prompt_tokens,
            "tokens_completion": self.completion_tokens,
            "native_tokens_prompt": self.prompt_tokens,
            "native_tokens_completion": self.completion_tokens,
            "finish_reason": "stop",
        }


class Books:
    def __init__(self) -> None:
        self.records: OrderedDict[str, Record] = OrderedDict()

    def open(self, record: Record) -> None:
        self.records[record.generation_id] = record
        if len(self.records) > RECORDS_MAX:
            self.records.popitem(last=False)

    def total_usd(self) -> Decimal:
        return sum((record.cost_usd for record in self.records.values()), Decimal(0))
