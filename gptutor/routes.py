"""All routes of the public listener. How a row reaches the middlewares is in `http/routing.py`."""

from gptutor.api import keys, models, payments, sign_in, usage
from gptutor.api.chat import completions
from gptutor.http import health
from gptutor.http.routing import Route

KEY_ID = "{key_id:[1-9][0-9]{0,17}}"

ROUTES = (
    Route("POST", "/v1/chat/completions", completions.complete, "api_key", "chat_per_minute", "refused_per_minute"),
    Route("GET", "/v1/models", models.list_models, "public", "models_per_minute"),
    Route("GET", "/v1/models/{model_id:.+}", models.show_model, "public", "models_per_minute"),
    Route("GET", "/vk-test", sign_in.vk_test, "vk", "sign_ins_per_minute"),
    Route("POST", "/update-token", sign_in.update_token, "vk", "sign_ins_per_minute"),
    Route("GET", "/v1/keys", keys.list_keys, "account", "account_pages_per_minute"),
    Route("POST", "/v1/keys", keys.create_key, "account", "account_pages_per_minute"),
    Route("PATCH", f"/v1/keys/{KEY_ID}", keys.limit_key, "account", "account_pages_per_minute"),
    Route("DELETE", f"/v1/keys/{KEY_ID}", keys.revoke_key, "account", "account_pages_per_minute"),
    Route("GET", "/v1/credits", usage.show_credits, "account", "account_pages_per_minute"),
    Route("GET", "/v1/usage", usage.list_usage, "account", "account_pages_per_minute"),
    Route("GET", "/v1/usage/totals", usage.sum_usage, "account", "account_pages_per_minute"),
    Route("GET", "/v1/generation", usage.show_generation, "account", "account_pages_per_minute"),
    Route("POST", "/v1/payments", payments.create_payment, "account", "account_pages_per_minute"),
    Route("POST", "/yookassa/webhook", payments.receive_notification, "public", "notifications_per_minute"),
    Route("GET", "/health", health.health, "public", None),
    Route("GET", "/ready", health.ready, "public", None),
)

METHODS = (*dict.fromkeys(route.method for route in ROUTES), "OPTIONS")
