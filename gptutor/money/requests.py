"""One request, found for an administrator by any of its ids, in whatever account: what the database knows of it
(`sql/queries/requests.sql`), and what the log says, which alone knows of requests that were refused before anything was held.
"""

import asyncio
import datetime
import uuid
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal

from gptutor.database.pool import Database, Row
from gptutor.money.amounts import AccountId, Nano
from gptutor.money.holds import Evidence
from gptutor.money.usage import State
from gptutor.telemetry.log_search import FoundLines, find_lines

FOUND_MAX = 50
ID_CHARACTERS_MAX = 200
ONE_DAY = datetime.timedelta(days=1)
Proof = Evidence | Literal["unknown", "none_yet", "nothing_bought", "none"]
"""`Evidence` of a charge, which is unknown for charges from before it was recorded; none_yet: the request runs, or recovery looks
for its cost; nothing_bought: the hold was released; none: recovery has given up."""
PROOF_WITHOUT_CHARGE: dict[State, Proof] = {
    "open": "none_yet",
    "awaiting_evidence": "none_yet",
    "released": "nothing_bought",
    "unresolved": "none",
    "settled": "unknown",
}


@dataclass(frozen=True, slots=True)
class FoundRequest:
    """`amount` was held for it at most, `held` is held now; `charge` and `cost_usd` are None until it is charged."""

    account_id: AccountId
    account_name: str
    hold_id: uuid.UUID
    request_id: str
    generation_id: str | None
    key_id: int
    key: str | None
    """The display prefix of the API key; None if the database has lost the key."""
    key_name: str | None
    model: str
    state: State
    proof: Proof
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: Decimal | None
    rub_per_usd: Decimal
    charge: Nano | None
    amount: Nano
    held: Nano
    recovery_attempts: int
    due_at: datetime.datetime
    """When recovery looks at it next, while it is open."""
    created_at: datetime.datetime
    closed_at: datetime.datetime | None


@dataclass(frozen=True, slots=True)
class RequestAnswer:
    """What is known of an id: nothing, if both are empty."""

    requests: list[FoundRequest]
    log: FoundLines


class InvalidId(ValueError):
    """The text cannot be the id of a request; the message says why."""


async def look_up(database: Database, logs: Path, any_id: str, *, log_within_s: float) -> RequestAnswer:
    """All that is known of this request id, generation id or hold id. Raises InvalidId, DatabaseUnavailable.

    The log files are searched for about `log_within_s` seconds: of requests that the database knows, those of their days.
    """
    if not 1 <= len(any_id) <= ID_CHARACTERS_MAX or not any_id.isprintable():
        raise InvalidId(f"The id of a request has 1 to {ID_CHARACTERS_MAX} printable characters")
    found = await find_requests(database, any_id)
    days = {day for request in found for day in _days_of(request)} or None
    ids = [any_id, *(request.request_id for request in found)]
    return RequestAnswer(found, await asyncio.to_thread(find_lines, logs, ids, within_s=log_within_s, days=days))


def _days_of(request: FoundRequest) -> set[datetime.date]:
    """The UTC days on which something about the request may be logged: a line may be written after midnight."""
    ends = [request.created_at, request.closed_at or datetime.datetime.now(datetime.UTC)]
    return {day for end in ends for day in (end.date(), (end + ONE_DAY).date())}


async def find_requests(database: Database, any_id: str, limit: int = FOUND_MAX) -> list[FoundRequest]:
    """Requests with this request id, generation id or hold id, newest first. Clients may choose the same request id.

    Raises DatabaseUnavailable.
    """
    rows = await database.fetch("find_requests", any_id, _uuid(any_id), limit)
    return [_request_of(row) for row in rows]


def _uuid(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        return None


def _request_of(row: Row) -> FoundRequest:
    return FoundRequest(
        account_id=AccountId(row["account_id"]),
        account_name=row["account_name"],
        hold_id=row["hold_id"],
        request_id=row["request_id"],
        generation_id=row["generation_id"],
        key_id=row["key_id"],
        key=row["key_prefix"],
        key_name=row["key_name"],
        model=row["model"],
        state=row["state"],
        proof=row["evidence"] or PROOF_WITHOUT_CHARGE[row["state"]],
        prompt_tokens=row["prompt_tokens"],
        completion_tokens=row["completion_tokens"],
        cost_usd=row["cost_usd"],
        rub_per_usd=row["rub_per_usd"],
        charge=None if row["charge_nano"] is None else Nano(row["charge_nano"]),
        amount=Nano(row["amount_nano"]),
        held=Nano(row["held_nano"]),
        recovery_attempts=row["recovery_attempts"],
        due_at=row["due_at"],
        created_at=row["created_at"],
        closed_at=row["closed_at"],
    )
