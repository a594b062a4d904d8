"""How users, keys, entries and payments are written for administrators and operators, in JSON and in CSV.

The command line (`--json`) and `/admin` write the same. Amounts are exact decimal strings in roubles, times are ISO 8601 in UTC.
"""

import csv
import datetime
import io
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from gptutor.money.amounts import AccountId, decimal_text, roubles
from gptutor.money.bookings import Booking, LedgerEntry
from gptutor.money.holds import HoldId, placed_at_ms
from gptutor.money.journal_records import HoldRecord
from gptutor.money.keyring import Key, KeyLimits
from gptutor.money.reconciliation import Reconciliation, WaitingHold, WaitingHolds
from gptutor.money.users import User
from gptutor.text import escaped

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
)
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
        "generation_id": entry.generation_id,
        "contra": entry.contra,
        "reason": entry.reason,
        "reference": entry.reference,
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
        }
        for day in found.days
    ]
    return {
        "days": days,
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
            *map(_cell, (entry.contra, entry.reason, entry.reference, entry.model, entry.generation_id)),
            _plain(entry.cost_usd) or "",
            _plain(entry.rub_per_usd) or "",
        )
        for account_id, entry in entries
    )


def _plain(number: Decimal | None) -> str | None:
    return None if number is None else decimal_text(number)


def _csv_text(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def _cell(text: str | None) -> str:
    text = escaped(text or "")
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text
