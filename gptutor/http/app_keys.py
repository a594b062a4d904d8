"""All keys of `app[…]` and `request[…]`: where each shared object is found.

The types are imported for the type checker only, because this package must not depend on the packages above it.
"""

from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptutor.api.auth import VkSignIn
    from gptutor.api.chat.context import Services
    from gptutor.api.models import ModelList
    from gptutor.api.payments import PaymentService
    from gptutor.config.schema import Config
    from gptutor.database.pool import Database
    from gptutor.http.address_limits import Network
    from gptutor.http.error_form import ErrorForm
    from gptutor.http.health import Readiness
    from gptutor.integrations.vk import Launch
    from gptutor.money.journal import Journal
    from gptutor.money.keyring import KeyRing
    from gptutor.money.keys import KeyClaim
    from gptutor.money.users import User
    from gptutor.money.vault import Vault

# -- of an application

CONFIG: "web.AppKey[Config]" = web.AppKey("config")
DATABASE: "web.AppKey[Database]" = web.AppKey("database")
JOURNAL: "web.AppKey[Journal]" = web.AppKey("journal")
ERROR_FORM: "web.AppKey[ErrorForm]" = web.AppKey("error_form")
"""Of errors for clients; an application without it has the text."""
KEYRING: "web.AppKey[KeyRing]" = web.AppKey("keyring")
MODEL_LIST: "web.AppKey[ModelList]" = web.AppKey("model_list")
PAYMENTS: "web.AppKey[PaymentService]" = web.AppKey("payments")
READINESS: "web.AppKey[Readiness]" = web.AppKey("readiness")
SERVICES: "web.AppKey[Services]" = web.AppKey("services")
"""What a chat completion uses beside the above."""
TRUSTED_PROXIES: "web.AppKey[Sequence[Network]]" = web.AppKey("trusted_proxies")
VAULT: "web.AppKey[Vault]" = web.AppKey("vault")
VK_SIGN_IN: "web.AppKey[VkSignIn]" = web.AppKey("vk_sign_in")

# -- of a request

AWAITS_CONTINUE = web.RequestKey("awaits_continue", bool)
"""Whether the client waits for `100 Continue` before it sends the body."""
CLAIM: "web.RequestKey[KeyClaim]" = web.RequestKey("claim")
"""The API key that the client presented, not yet verified; set on routes for `api_key`."""
ERROR_CAUSE = web.RequestKey("error_cause", str)
ERROR_CODE = web.RequestKey("error_code", str)
KEY_VERIFIED = web.RequestKey("key_verified", bool)
"""Present if the database has verified CLAIM."""
LAUNCH: "web.RequestKey[Launch]" = web.RequestKey("launch")
"""The verified launch parameters; set on routes for `vk`."""
LOGGED = web.RequestKey("logged", bool)
"""Present if the handler writes log lines of its own, in place of the access log's."""
MANAGES_KEYS = web.RequestKey("manages_keys", bool)
"""Whether the client may change the account's keys: with the main key or a sign-in; set on routes for `account`."""
REQUEST_ID = web.RequestKey("request_id", str)
USER: "web.RequestKey[User]" = web.RequestKey("user")
"""Set on routes for `account` and `vk`."""
