"""The account of the simulator's user: its key, the key's limit, its credit. Each can be changed while the simulator runs.

`POST /simulator/account` takes `{"revoked": true}`, `{"limit": 0.5}`, `{"credit": 0}`, or several of them; `null` lifts a limit,
and `{}` restores the account. `GET /simulator/account` shows it.
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from gptutor.simulator.model_library import SimulatedModel
from gptutor.simulator.response_script import Script, error_response

KEYS_PAGE = "https://openrouter.ai/settings/keys"
CREDITS_PAGE = "https://openrouter.ai/settings/credits"
MANAGEMENT_KEY = "sk-or-management"
"""The key that may read `/credits`; others get 403."""


@dataclass(slots=True)
class SimulatedAccount:
    """`limit_usd` and `credit_usd` are all that may ever be used; None: any amount."""

    is_revoked: bool = False
    limit_usd: Decimal | None = None
    credit_usd: Decimal | None = None

    def change(self, document: dict[str, Any]) -> None:
        """Raises ValueError, ArithmeticError for what is not an account."""
        if document.keys() - {"revoked", "limit", "credit"}:
            raise ValueError("only revoked, limit and credit can be set")
        self.is_revoked = document.get("revoked") is True
        self.limit_usd, self.credit_usd = _dollars(document.get("limit")), _dollars(document.get("credit"))

    def shown(self) -> dict[str, Any]:
        return {"revoked": self.is_revoked, "limit": self.limit_usd, "credit": self.credit_usd}

    def rejects_key(self) -> Script | None:
        """The response to every request while the key is revoked."""
        return error_response(401, "User not found.") if self.is_revoked else None

    def refuses(self, model: SimulatedModel, request: dict[str, Any], used_usd: Decimal) -> Script | None:
        """The response to a completion that the account may not have."""
        if self.limit_usd is not None and used_usd >= self.limit_usd:
            return error_response(403, f"Key limit exceeded (total limit). Manage it using {KEYS_PAGE}")
        if self.credit_usd is None:
            return None
        left_usd = self.credit_usd - used_usd
        if left_usd <= 0:
            return error_response(402, f"Insufficient credits. Add more using {CREDITS_PAGE}")
        price_usd = model.price_usd("completion")
        tokens = request.get("max_tokens") or request.get("max_completion_tokens") or model.output_max or model.context
        if price_usd * tokens > left_usd:
            return error_response(
                402,
                "This request requires more credits, or fewer max_tokens. You requested up to "
                f"{tokens} tokens, but can only afford {int(left_usd / price_usd)}. To increase, visit {CREDITS_PAGE}",
            )
        return None

    def key(self, used_usd: Decimal, provider_usd: Decimal) -> dict[str, Any]:
        """The `data` of `GET /key`."""
        return {
            "label": "sk-or-simulator",
            "limit": self.limit_usd,
            "limit_remaining": None if self.limit_usd is None else self.limit_usd - used_usd,
            "limit_reset": None,
            "include_byok_in_limit": False,
            "usage": used_usd,
            "usage_daily": used_usd,
            "usage_weekly": used_usd,
            "usage_monthly": used_usd,
            "byok_usage": provider_usd,
            "byok_usage_daily": provider_usd,
            "byok_usage_weekly": provider_usd,
            "byok_usage_monthly": provider_usd,
            "is_free_tier": False,
            "is_management_key": False,
            "expires_at": None,
            "rate_limit": {"requests": -1, "interval": "10s"},
        }

    def credits(self, used_usd: Decimal) -> dict[str, Any]:
        """The `data` of `GET /credits`."""
        return {"total_credits": used_usd if self.credit_usd is None else self.credit_usd, "total_usage": used_usd}


def _dollars(value: Any) -> Decimal | None:
    return None if value is None else Decimal(str(value))
