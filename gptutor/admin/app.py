"""The administrators' application: `/admin/*` and `/metrics`, on a listener of its own (`admin.socket` or `admin.port`)."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gptutor.admin import audit, money, reports, requests, users
from gptutor.admin.auth import authenticate_administrator
from gptutor.admin.responses import administration_errors
from gptutor.config.schema import ADMIN_CONNECTIONS_MAX, Config
from gptutor.database import pool
from gptutor.errors import ApiError
from gptutor.http import middlewares
from gptutor.http.address_limits import parse_networks
from gptutor.http.app_keys import CONFIG, DATABASE, TRUSTED_PROXIES, VAULT
from gptutor.http.body import SMALL_BODY_LIMITS, defer_continue
from gptutor.http.errors import errors
from gptutor.http.request_counts import count_routes
from gptutor.money.vault import Vault
from gptutor.telemetry.log_writer import require_room
from gptutor.telemetry.logs import LoggerService
from gptutor.telemetry.metrics_page import metrics_handler
from gptutor.telemetry.shared_metrics import MetricsText, own_text

LOGGER = logging.getLogger("gptutor.admin")
"""In a pool of its own: an export to a slow reader takes no connection from clients' requests."""
STATEMENT_S = 300
IDLE_S = 60
USER = r"/admin/users/{user_id:[1-9][0-9]{0,17}}"
KEY = USER + r"/keys/{key_id:[1-9][0-9]{0,17}}"


def build_admin(
    config: Config, *, log: LoggerService, secrets: Sequence[bytes], metrics: MetricsText = own_text
) -> web.Application:
    """`config.database.url` is set here, as in `build_app`."""
    app = web.Application(
        client_max_size=SMALL_BODY_LIMITS.bytes_max,
        middlewares=[
            middlewares.request_id,
            middlewares.access_log(log),
            errors,
            authenticate_administrator(config.admin.tokens),  # an unauthenticated client does not learn which paths exist
            middlewares.body_limit(SMALL_BODY_LIMITS.bytes_max),
            administration_errors,
            require_audit_log(config.paths.logs),  # last, when the request is known to be an administrator's
        ],
    )
    app.on_response_prepare.append(middlewares.add_request_id)
    app[CONFIG] = config
    app[TRUSTED_PROXIES] = parse_networks(config.server.trusted_proxies)
    app[VAULT] = Vault(secrets)
    app[requests.SEARCH] = asyncio.Lock()
    app[audit.AUDIT] = asyncio.Lock()
    app.cleanup_ctx.append(database_context)
    app.add_routes(
        [
            web.get("/admin/users", users.list_users),
            web.post("/admin/users", users.create_user, expect_handler=defer_continue),
            web.get(USER, users.show_user),
            web.patch(USER, users.describe_user, expect_handler=defer_continue),
            web.post(USER + "/erase", users.erase_user, expect_handler=defer_continue),
            web.post(USER + "/rotate-key", users.rotate_keys),
            web.post(USER + "/activate", users.activate_user),
            web.post(USER + "/deactivate", users.deactivate_user),
            web.get(USER + "/keys", users.list_keys),
            web.post(USER + "/keys", users.issue_key, expect_handler=defer_continue),
            web.patch(KEY, users.limit_key, expect_handler=defer_continue),
            web.delete(KEY, users.revoke_key),
            web.get(USER + "/ledger", money.ledger),
            web.post(USER + "/bookings", money.book, expect_handler=defer_continue),
            web.post("/admin/payments", money.pay, expect_handler=defer_continue),
            web.get("/admin/holds", money.holds),
            web.get("/admin/export/ledger", money.export_ledger),
            web.get("/admin/requests/{id:[^/]+}", requests.show_request),
            web.get("/admin/report", reports.show_report),
            web.get("/admin/verify", audit.verify),
            web.get("/admin/reconcile", audit.show_reconciliation),
            web.get("/metrics", metrics_handler(metrics)),
        ]
    )
    count_routes(app)
    return app


def require_audit_log(directory: Path) -> Middleware:
    """Nothing is changed while its audit line could not be written, as on a full disk."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method not in ("GET", "HEAD"):
            try:
                await asyncio.to_thread(require_room, directory)
            except OSError as error:
                LOGGER.error("Nothing is changed while audit lines cannot be written: %s", error)
                raise ApiError("audit_log_unavailable", cause=str(error)) from error
        return await handler(request)

    return middleware


async def database_context(app: web.Application) -> AsyncIterator[None]:
    limits = app[CONFIG].database
    async with pool.open_database(
        limits.url,
        name="gptutor admin",
        connections_min=0,
        connections_max=ADMIN_CONNECTIONS_MAX,
        acquire_s=limits.acquire_s,
        statement_s=STATEMENT_S,
        idle_s=IDLE_S,
    ) as connected:
        app[DATABASE] = connected
        yield
