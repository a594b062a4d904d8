"""`/admin/report`: what was earned and what it cost."""

from aiohttp import web

from gptutor.admin.responses import data_response
from gptutor.errors import ApiError
from gptutor.http.app_keys import CONFIG, DATABASE
from gptutor.http.query import Query
from gptutor.money.amounts import InvalidAmount
from gptutor.money.report import GROUPINGS, RATE_MAX, By, parse_rate, report, report_json

DAYS = 31
DAYS_MAX = 3660


async def show_report(request: web.Request) -> web.Response:
    """`?from=&to=&by=&cost_rub_per_usd=`; by default the last 31 days, by day, with the rate of the settings."""
    query = Query(request, ("from", "to", "by", "cost_rub_per_usd"))
    by: By = query.one_of("by", GROUPINGS)  # type: ignore[assignment]
    period = query.period(days=DAYS, days_max=DAYS_MAX)
    rate = request.app[CONFIG].billing.cost_rub_per_usd
    if (given := query.text("cost_rub_per_usd")) is not None:
        try:
            rate = parse_rate(given)
        except InvalidAmount as error:
            text = f"cost_rub_per_usd must be a number such as 82.5, up to {RATE_MAX}"
            raise ApiError("invalid_request", text) from error
    return data_response(report_json(await report(request.app[DATABASE], period.first, period.last, by, rate or None)))
