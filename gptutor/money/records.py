"""How users, keys, entries and payments are written for an administrator, in JSON and in CSV. Amounts are exact, in roubles.

The command line (`--json`) and the administrator's listener write the same.
"""

import csv
import io
from collections.abc import Iterable
from typing import Any

from gptutor.money.administration import UserDetails
from gptutor.money.amounts import AccountId, roubles
from gptutor.money.bookings import Booking, LedgerEntry
from gptutor.money.keyring import Key
from gptutor.money.users import User

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
        "balance": roubles(user.balance),
        "held": roubles(user.held),
        "available": roubles(user.available),
        "isActive": user.is_active,
        "createdAt": user.created_at,
        "updatedAt": user.updated_at,
    }


def person_json(person: UserDetails) -> dict[str, Any]:
    return {
        **user_json(person.user),
        "identities": [{"provider": provider, "id": subject} for provider, subject in person.identities],
        "keys": [key_json(key) for key in person.keys],
    }


def key_json(key: Key) -> dict[str, Any]:
    limits = key.limits
    return {
        "id": key.key_id,
        "key": f"{key.shown}…",
        "name": key.name,
        "isMain": key.is_main,
        "cap": None if limits.cap is None else roubles(limits.cap),
        "capPeriod": limits.cap_period,
        "spent": None if limits.cap is None else roubles(key.spent),
        "held": None if limits.cap is None else roubles(key.held),
        "perMinute": limits.per_minute,
        "expiresAt": limits.expires_at,
        "createdAt": key.created_at,
        "revokedAt": key.revoked_at,
    }


def entry_json(entry: LedgerEntry) -> dict[str, Any]:
    return {
        "id": str(entry.entry_id),
        "kind": entry.kind,
        "amount": roubles(entry.amount),
        "costUsd": None if entry.cost_usd is None else f"{entry.cost_usd:f}",
        "rubPerUsd": None if entry.rub_per_usd is None else f"{entry.rub_per_usd:f}",
        "model": entry.model,
        "generationId": entry.generation_id,
        "contra": entry.contra,
        "reason": entry.reason,
        "reference": entry.reference,
        "createdAt": entry.created_at,
    }


def booking_json(booking: Booking) -> dict[str, Any]:
    return {
        "entryId": str(booking.entry_id),
        "userId": booking.account_id,
        "kind": booking.kind,
        "amount": roubles(booking.amount),
        "createdAt": booking.created_at,
    }


def csv_head() -> str:
    return _lines([CSV_COLUMNS])


def csv_lines(entries: Iterable[tuple[AccountId, LedgerEntry]]) -> str:
    """Texts that a spreadsheet would take for a formula begin with an apostrophe: callers name models."""
    return _lines(
        (
            account_id,
            entry.created_at.isoformat(),
            entry.entry_id,
            entry.kind,
            roubles(entry.amount),
            *(_harmless(text or "") for text in (entry.contra, entry.reason, entry.reference, entry.model, entry.generation_id)),
            "" if entry.cost_usd is None else f"{entry.cost_usd:f}",
            "" if entry.rub_per_usd is None else f"{entry.rub_per_usd:f}",
        )
        for account_id, entry in entries
    )


def _lines(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def _harmless(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text
