"""What OpenRouter says of our own account, and whether completions may be requested meanwhile. Pure: the time is a parameter.

    trouble         what it is                                   what ends the refusal
    invalid_key     our API key is not valid                     `/key` accepts it
    key_limit       the spending limit of our key is used up     `/key` states that something is left
    no_credit       our credit is used up                        a completion succeeds: `/key` does not state the credit
    too_dear        this request may cost more than is left      nothing is refused: the next one may be cheaper
    in_flight       the credit is held for running requests      nothing is refused: it is over in a moment
    other           our account, in words that are not known     nothing is refused

One request's error never closes the service for a reason that may be its own: of `invalid_key` and `key_limit` `/key` is asked
first, and `no_credit` is recognised by what OpenRouter says of an account without credit, and by nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, TypeVar

import msgspec

from gptutor.openrouter.bill import parse_usd

Trouble = Literal["invalid_key", "key_limit", "no_credit", "too_dear", "in_flight", "other"]
Refusal = Literal["invalid_key", "key_limit", "no_credit"]

TEXTS: dict[Refusal, str] = {
    "invalid_key": "OpenRouter does not accept the API key of this service",
    "key_limit": "the spending limit of this service's API key at OpenRouter is used up",
    "no_credit": "the credit of this service at OpenRouter is used up",
}
ENDED_BY_KEY: frozenset[Refusal] = frozenset({"invalid_key", "key_limit"})
"""Refusals that `/key` confirms and ends."""

TOO_DEAR_WORDS = ("can only afford", "fewer max_tokens", "requires more credits")
NO_CREDIT_WORDS = "insufficient credits"
KEY_LIMIT_WORDS = ("key limit", "limit exceeded", "insufficient", "guardrail budget")
"""Of a 403, which is moderation otherwise."""


def trouble_of(
    status: int, message: str | None, metadata: Mapping[str, Any], *, has_retry_after: bool, is_own: bool
) -> Trouble | None:
    """What an error response says of our account; None: nothing.

    `is_own`: the body is an error in OpenRouter's form, and not a page of a proxy on the way.
    """
    words = (message or "").lower()
    if status == 403:
        return "key_limit" if any(each in words for each in KEY_LIMIT_WORDS) else None
    if status not in (401, 402):
        return None
    if not is_own or "provider_name" in metadata:  # an error of a provider whose own key we keep at OpenRouter
        return "other"
    if status == 401:
        return "invalid_key"
    source, reason = metadata.get("limit_source"), metadata.get("reason")
    if has_retry_after or source == "openrouter_in_flight_budget":
        return "in_flight"
    if reason == "weight_exceeds_budget" or any(each in words for each in TOO_DEAR_WORDS):
        return "too_dear"
    if source == "openrouter_key_limit" or "key limit" in words:
        return "key_limit"
    return "no_credit" if NO_CREDIT_WORDS in words else "other"


@dataclass(slots=True)
class AccountGate:
    """Closed while OpenRouter refuses our account; then one completion each `probe_s` passes, if it can find out anything."""

    probe_s: float
    refusal: Refusal | None = None
    next_probe_at: float = 0.0

    def wait_s(self, now: float) -> float | None:
        """How long until it is known whether the refusal has ended; None: a completion may be requested."""
        if self.refusal is None:
            return None
        if self.refusal in ENDED_BY_KEY:
            return self.probe_s
        return self.next_probe_at - now if now < self.next_probe_at else None

    def begin_probe(self, now: float) -> bool:
        """Whether a completion that is requested now is the probe. To be called if `wait_s` is None."""
        if self.refusal is None:
            return False
        self.next_probe_at = now + self.probe_s
        return True

    def close(self, refusal: Refusal, now: float) -> None:
        if self.refusal is None:
            self.next_probe_at = now + self.probe_s
        self.refusal = refusal

    def open(self) -> None:
        self.refusal = None


@dataclass(frozen=True, slots=True)
class KeyReport:
    """What `/key` says, in dollars; None: no limit. `limit_left_usd` may be negative."""

    limit_usd: Decimal | None
    limit_left_usd: Decimal | None

    @property
    def is_used_up(self) -> bool:
        return self.limit_left_usd is not None and self.limit_left_usd <= 0


def read_key(document: bytes) -> KeyReport:
    """Raises ValueError."""
    key = _decode(document, _KeyResponse).data
    return KeyReport(_signed_usd(key.limit), _signed_usd(key.limit_remaining))


def read_credit(document: bytes) -> Decimal:
    """The dollars that are left by `/credits`; negative if more was used than bought. Raises ValueError."""
    data = _decode(document, _CreditsResponse).data
    bought, used = _signed_usd(data.total_credits), _signed_usd(data.total_usage)
    if bought is None or used is None:
        raise ValueError("no total_credits or total_usage")
    return bought - used


def describe(key: KeyReport, credit_usd: Decimal | None) -> str:
    """For the operator, such as `key limit $50.00, $12.34 left; credit left $3.20`."""
    limit = "the key has no limit"
    if key.limit_usd is not None:
        limit = f"key limit ${key.limit_usd:.2f}"
    if key.limit_left_usd is not None:
        limit += f", ${key.limit_left_usd:.2f} left"
    return limit if credit_usd is None else f"{limit}; credit left ${credit_usd:.2f}"


class _Key(msgspec.Struct):
    limit: msgspec.Raw = msgspec.Raw(b"null")
    limit_remaining: msgspec.Raw = msgspec.Raw(b"null")


class _KeyResponse(msgspec.Struct):
    data: _Key


class _Credits(msgspec.Struct):
    total_credits: msgspec.Raw = msgspec.Raw(b"null")
    total_usage: msgspec.Raw = msgspec.Raw(b"null")


class _CreditsResponse(msgspec.Struct):
    data: _Credits


T = TypeVar("T", _KeyResponse, _CreditsResponse)


def _decode(document: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(document, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError("the response is not as documented") from error


def _signed_usd(number: msgspec.Raw) -> Decimal | None:
    """A JSON number, which may be negative; None for null. Raises ValueError for anything else."""
    text = bytes(number).strip()
    if text == b"null":
        return None
    usd = parse_usd(text.removeprefix(b"-"))
    if usd is None:
        raise ValueError("an amount is not a number")
    return -usd if text.startswith(b"-") else usd
