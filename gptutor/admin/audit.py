"""`/admin/verify` and `/admin/reconcile`: whether the books are right, against themselves and against OpenRouter.

Each runs once at a time, because it reads all rows, or asks OpenRouter.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from gptutor.admin.responses import data_response
from gptutor.errors import ApiError
from gptutor.http.app_keys import CONFIG, DATABASE
from gptutor.http.query import Query
from gptutor.money.balance_auditor import end_alert
from gptutor.money.invariants import check, findings_json
from gptutor.money.journal import JOURNALS, read_unbooked
from gptutor.money.reconciliation import Tolerance, reconcile
from gptutor.money.records import reconciliation_json
from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.totals import totals

VERIFY_S = 600
AUDIT = web.AppKey("audit", asyncio.Lock)


async def verify(request: web.Request) -> web.Response:
    """All findings, when the last invariant is checked. A database for which VERIFY_S is too short needs `gptutor verify`."""
    Query(request, ())
    async with _alone(request):
        try:
            async with asyncio.timeout(VERIFY_S):
                findings = [finding async for finding in check(request.app[DATABASE])]
        except TimeoutError as error:
            text = f"The invariants could not be checked within {VERIFY_S} seconds; gptutor verify takes as long as it needs"
            raise ApiError("database_unavailable", text) from error
        await end_alert(request.app[DATABASE], findings)
    return data_response(findings_json(findings))


async def show_reconciliation(request: web.Request) -> web.Response:
    Query(request, ())
    config = request.app[CONFIG]
    async with _alone(request):
        try:
            upstream = config.openrouter
            theirs = await totals(upstream.base_url, upstream.api_key, upstream.management_key, proxy=upstream.proxy)
        except UpstreamError as error:
            raise ApiError("upstream_error", f"OpenRouter's totals cannot be read: {error}") from error
        tolerance = Tolerance(config.reconcile.difference_usd_max, config.reconcile.difference_percent_max)
        found = await reconcile(request.app[DATABASE], theirs, tolerance)
        unbooked = await asyncio.to_thread(read_unbooked, config.paths.data / JOURNALS)
    return data_response(reconciliation_json(found, unbooked))


@asynccontextmanager
async def _alone(request: web.Request) -> AsyncIterator[None]:
    """Raises ApiError while another one runs."""
    lock = request.app[AUDIT]
    if lock.locked():
        raise ApiError("overloaded", "verify or reconcile is running already; try again when it has ended")
    async with lock:
        yield
