"""What can be asked of the service, who answers it, and which answers need to know who asks."""

from typing import Any

from gptutor.api import keys, models, payments, sign_in, usage
from gptutor.api.chat import completions
from gptutor.http import health
from gptutor.http.middlewares import Handler

KEYED = frozenset({completions.complete})
"""The handlers that need an API key."""
PERSONAL: frozenset[Any] = frozenset(
    {
        keys.list_keys,
        keys.create_key,
        keys.limit_key,
        keys.revoke_key,
        usage.show_credits,
        usage.list_usage,
        usage.sum_usage,
        usage.show_generation,
        payments.create_payment,
    }
)
"""The handlers of the account's own endpoints: a key, or a sign-in."""

ROUTES: list[tuple[str, str, Handler]] = [
    ("POST", "/v1/chat/completions", completions.complete),
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{model_id:.+}", models.show_model),
    ("GET", "/vk-test", sign_in.vk_test),
    ("POST", "/update-token", sign_in.update_token),
    ("GET", "/v1/keys", keys.list_keys),
    ("POST", "/v1/keys", keys.create_key),
    ("PATCH", "/v1/keys/{key_id:[1-9][0-9]{0,17}}", keys.limit_key),
    ("DELETE", "/v1/keys/{key_id:[1-9][0-9]{0,17}}", keys.revoke_key),
    ("GET", "/v1/credits", usage.show_credits),
    ("GET", "/v1/usage", usage.list_usage),
    ("GET", "/v1/usage/totals", usage.sum_usage),
    ("GET", "/v1/generation", usage.show_generation),
    ("POST", "/v1/payments", payments.create_payment),
    ("POST", "/yookassa/webhook", payments.notified),
    ("GET", "/health", health.health),
    ("GET", "/ready", health.ready),
]
