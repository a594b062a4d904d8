"""How users, keys, entries and payments are written for administrators and operators, in JSON and in CSV.

The command line (`--json`) and `/admin` write the same. Amounts are exact decimal strings in roubles, times are ISO 8601 in UTC.
"""

import csv
import datetime
import io
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import orjson

from gptutor.money.amounts import AccountId, decimal_text, roubles
from gptutor.money.bookings import Booking, LedgerEntry
from gptutor.money.holds import HoldId, placed_at_ms
from gptutor.money.journal_records import HoldRecord
from gptutor.money.keyring import Key, KeyLimits
from gptutor.money.reconciliation import Reconciliation, WaitingHold, WaitingHolds
from gptutor.money.requests import FoundRequest, RequestAnswer
from gptutor.money.users import User
from gptutor.text import escaped, escaped_json

if TYPE_CHECKING:
    from gptutor.money.administration import UserDetails

CSV_COLUMNS = (
    "user_id",
    "created_at",
    "entry_id",
    "kind",
    "amount_rub",
    "contra",
    "reason",
    "reference",
    "model",
    "generation_id",
    "cost_usd",
    "rub_per_usd",
    "request_id",
    "key",
    "prompt_tokens",
    "completion_tokens",
    "evidence",
    "booked_by",
)
"""New columns come last: programs may read the others by their places."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def user_json(user: User) -> dict[str, Any]:
    return {
        "id": user.account_id,
        "name": user.name,
        "contact": user.contact,
        "note": user.note,
        "balance": roubles(user.balance),
        "held": roubles(user.held),
        "available": roubles(user.available),
        "is_active": user.is_active,
        "created_at": timestamp(user.created_at),
        "updated_at": timestamp(user.updated_at),
        "erased_at": None if user.erased_at is None else timestamp(user.erased_at),
    }


def user_details_json(details: "UserDetails") -> dict[str, Any]:
    return {
        **user_json(details.user),
        "identities": [{"provider": provider, "id": subject} for provider, subject in details.identities],
        "keys": [key_json(key) for key in details.keys],
    }


def key_json(key: Key) -> dict[str, Any]:
    """`usage` and `held` are counted only for keys with a limit: null for others."""
    has_limit = key.limits.limit is not None
    return {
        "id": key.key_id,
        "label": key.shown,
        "name": key.name,
        "is_main": key.is_main,
        **key_limits_json(key.limits),
        "usage": roubles(key.spent) if has_limit else None,
        "held": roubles(key.held) if has_limit else None,
        "created_at": timestamp(key.created_at),
        "revoked_at": None if key.revoked_at is None else timestamp(key.revoked_at),
    }


def key_limits_json(limits: KeyLimits) -> dict[str, Any]:
    return {
        "limit": None if limits.limit is None else roubles(limits.limit),
        "limit_reset": limits.limit_reset,
        "requests_per_minute": limits.requests_per_minute,
        "expires_at": None if limits.expires_at is None else timestamp(limits.expires_at),
    }


def entry_json(entry: LedgerEntry) -> dict[str, Any]:
    return {
        "id": str(entry.entry_id),
        "kind": entry.kind,
        "amount": roubles(entry.amount),
        "cost_usd": _plain(entry.cost_usd),
        "rub_per_usd": _plain(entry.rub_per_usd),
        "model": entry.model,
        "prompt_tokens": entry.prompt_tokens,
        "completion_tokens": entry.completion_tokens,
        "generation_id": entry.generation_id,
        "request_id": entry.request_id,
        "key": entry.key,
        "evidence": entry.evidence,
        "contra": entry.contra,
        "reason": entry.reason,
        "reference": entry.reference,
        "booked_by": entry.booked_by,
        "created_at": timestamp(entry.created_at),
    }


def booking_json(booking: Booking) -> dict[str, Any]:
    return {
        "entry_id": str(booking.entry_id),
        "user_id": booking.account_id,
        "kind": booking.kind,
        "amount": roubles(booking.amount),
        "created_at": timestamp(booking.created_at),
    }


def waiting_hold_json(hold: WaitingHold) -> dict[str, Any]:
    return {
        "user_id": hold.account_id,
        "state": hold.state,
        "at_most": roubles(hold.amount),
        "model": hold.model,
        "request_id": hold.request_id,
        "generation_id": hold.generation_id,
        "created_at": timestamp(hold.created_at),
    }


def waiting_holds_json(holds: WaitingHolds) -> dict[str, Any]:
    return {
        "waiting": [waiting_hold_json(hold) for hold in holds.oldest],
        "waiting_count": holds.count,
        "waiting_at_most": roubles(holds.at_most),
    }


def request_json(request: FoundRequest) -> dict[str, Any]:
    """`charged`, `cost_usd` and the tokens are null until they are known; `next_lookup_at` is null unless the hold is open."""
    return {
        "id": str(request.hold_id),
        "request_id": request.request_id,
        "generation_id": request.generation_id,
        "user_id": request.account_id,
        "user_name": request.account_name,
        "key": {"id": request.key_id, "label": request.key, "name": request.key_name},
        "model": request.model,
        "state": request.state,
        "evidence": request.proof,
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": request.completion_tokens,
        "cost_usd": _plain(request.cost_usd),
        "rub_per_usd": _plain(request.rub_per_usd),
        "charged": None if request.charge is None else roubles(request.charge),
        "held_at_most": roubles(request.amount),
        "held": roubles(request.held),
        "recovery_attempts": request.recovery_attempts,
        "next_lookup_at": timestamp(request.due_at) if request.closed_at is None else None,
        "created_at": timestamp(request.created_at),
        "closed_at": None if request.closed_at is None else timestamp(request.closed_at),
    }


def request_answer_json(answer: RequestAnswer) -> dict[str, Any]:
    """`log` has the lines as they were logged; they are all if `log_is_complete`."""
    return {
        "requests": [request_json(request) for request in answer.requests],
        "log": answer.log.lines,
        "log_is_complete": answer.log.is_complete,
    }


def unbooked_json(hold_id: HoldId, record: HoldRecord) -> dict[str, Any]:
    """A request that the journal knows, and whose account the database has lost. None: not known."""
    facts, charge = record.facts, record.charge
    return {
        "user_id": record.account_id,
        "charge": None if charge is None else roubles(charge.amount),
        "cost_usd": None if charge is None else _plain(charge.cost_usd),
        "at_most": None if facts is None else roubles(facts.amount),
        "model": None if facts is None else facts.model,
        "request_id": None if facts is None else facts.request_id,
        "generation_id": record.generation_id,
        "created_at": timestamp(datetime.datetime.fromtimestamp(placed_at_ms(hold_id) / 1000, datetime.UTC)),
    }


def reconciliation_json(found: Reconciliation, unbooked: Mapping[HoldId, HoldRecord]) -> dict[str, Any]:
    days = [
        {
            "day": day.day.isoformat(),
            "ours_usd": _plain(day.ours_usd),
            "openrouter_usd": _plain(day.theirs_usd),
            "difference_usd": _plain(day.difference_usd),
            "is_too_different": day.is_too_different,
        }
        for day in found.days
    ]
    return {
        "days": days,
        "is_too_different": found.is_too_different,
        **waiting_holds_json(found.waiting),
        "unbooked": [unbooked_json(hold_id, record) for hold_id, record in unbooked.items()],
    }


def timestamp(at: datetime.datetime) -> str:
    """ISO 8601 in UTC, with milliseconds: `2026-11-24T10:30:15.123Z`."""
    return at.astimezone(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def csv_header() -> str:
    return _csv_text([CSV_COLUMNS])


def csv_lines(entries: Iterable[tuple[AccountId, LedgerEntry]]) -> str:
    """Clients choose model names, so a text that a spreadsheet would run as a formula gets an apostrophe in front, and
    characters that control a terminal are escaped."""
    return _csv_text(
        (
            account_id,
            timestamp(entry.created_at),
            entry.entry_id,
            entry.kind,
            roubles(entry.amount),
            *map(csv_cell, (entry.contra, entry.reason, entry.reference, entry.model, entry.generation_id)),
            _plain(entry.cost_usd) or "",
            _plain(entry.rub_per_usd) or "",
            *map(csv_cell, (entry.request_id, entry.key)),
            *("" if count is None else count for count in (entry.prompt_tokens, entry.completion_tokens)),
            *map(csv_cell, (entry.evidence, entry.booked_by)),
        )
        for account_id, entry in entries
    )


def json_lines(entries: Iterable[tuple[AccountId, LedgerEntry]]) -> bytes:
    """A line of JSON for each entry, with characters that control a terminal escaped."""
    return b"".join(
        escaped_json(orjson.dumps({"user_id": account_id, **entry_json(entry)}, option=orjson.OPT_APPEND_NEWLINE))
        for account_id, entry in entries
    )


def _plain(number: Decimal | None) -> str | None:
    return None if number is None else decimal_text(number)


def _csv_text(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def csv_cell(text: str | None) -> str:
    text = escaped(text or "")
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text
