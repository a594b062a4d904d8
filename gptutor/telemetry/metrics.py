"""Prometheus metrics for the operator (contract F11). Each metric's help text says what it counts.

They are served on a listener of their own, which is off unless `metrics.port` is set, because traffic and error rates are not
public. The client library adds `_total` to the names of counters.
"""

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, Histogram, generate_latest

COMPLETIONS = Counter(
    "gptutor_completions",
    "Finished chat completion requests, by outcome: settled, released, awaiting_evidence, or an error code.",
    ["outcome"],
)
COMPLETION_DURATION = Histogram(
    "gptutor_completion_duration_seconds",
    "Time from the arrival of a chat completion request until its hold is settled, released or handed over to recovery.",
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)
IN_FLIGHT_REQUESTS = Gauge(
    "gptutor_in_flight_requests", "Chat completion requests whose hold is not yet settled, released or handed over to recovery."
)
ERROR_RESPONSES = Counter("gptutor_errors", "Error responses, by error code.", ["code"])
MALFORMED_REQUESTS = Counter("gptutor_malformed_requests", "Requests that could not be parsed as HTTP.")
HEADER_TIMEOUTS = Counter(
    "gptutor_header_timeouts", "Connections closed because the headers of a request did not arrive within the timeout."
)
REJECTED_CONNECTIONS = Counter(
    "gptutor_rejected_connections",
    "Connections closed at once, by reason: limit (too many in all or from one address), descriptors (hardly any are left).",
    ["reason"],
)
OFFLOADED_PARSES = Counter(
    "gptutor_offloaded_parses", "Request bodies so large that they were parsed in a thread instead of the event loop."
)
DISCONNECTED_CLIENTS = Counter(
    "gptutor_disconnected_clients", "Streamed responses whose client disconnected or stopped reading before the end."
)
UPSTREAM_FAILURES = Counter(
    "gptutor_upstream_failures", "Failed attempts to call OpenRouter, by kind of failure and HTTP status.", ["kind", "status"]
)
UPSTREAM_RETRIES = Counter("gptutor_upstream_retries", "Second and later attempts to call OpenRouter for one request.")
UPSTREAM_ACCOUNT_ERRORS = Counter(
    "gptutor_upstream_account_errors",
    "Errors of OpenRouter about the operator's own account: key, credit or limits. Alert on any increase.",
    ["status"],
)
CHARGE_OVERRUNS = Counter(
    "gptutor_charge_overruns",
    "Charges above their holds: OpenRouter billed more than its list allows. Alert on any increase.",
)
CLOCK_SKEW = Gauge(
    "gptutor_clock_skew_seconds",
    "Local clock minus the clock of OpenRouter, by the Date header of its responses. Sign-in with VK needs a correct clock.",
)
INCONSISTENT_ACCOUNTS = Gauge(
    "gptutor_inconsistent_accounts",
    "Accounts whose balance is not the sum of their ledger entries, or whose held amount is not the sum of their open holds. "
    "Alert on any.",
)
LOST_COMMITS = Counter(
    "gptutor_lost_commits",
    "Closed holds that the database had lost, as by a restore or a promotion, and that were closed again by the journal. "
    "Alert on any increase.",
)
UNBOOKED_CHARGES = Counter(
    "gptutor_unbooked_charges",
    "Requests that cannot be charged, because the database has lost their account: gptutor reconcile lists them. "
    "Alert on any increase.",
)
CATALOGUE_AGE = Gauge("gptutor_catalogue_age_seconds", "Time since the model list was last read from OpenRouter.")
LOG_LINES_LOST = Counter(
    "gptutor_log_lines_lost",
    "Log lines that could not be written, by destination: file (a full disk), stdout, stderr (a reader that does not read).",
    ["destination"],
)
LAST_RELOAD_SUCCESS = Gauge(
    "gptutor_last_reload_success",
    "1: the last reload, or the start, took the settings over. 0: the previous ones stay in effect, and the log says why. "
    "Alert on 0.",
)
LAST_RELOAD_TIMESTAMP = Gauge(
    "gptutor_last_reload_timestamp_seconds", "When the last reload, or the start, was tried: Unix time."
)
PAYMENT_NOTIFICATIONS = Counter(
    "gptutor_payment_notifications",
    "Notifications from the payment provider, by outcome: booked, nothing, pending (to be repeated), unavailable, or a reason of "
    "gptutor_payments_not_credited.",
    ["outcome"],
)
PAYMENT_LOOKUPS = Counter(
    "gptutor_payment_lookups",
    "Look-ups of payments that have not ended, by outcome as above. Many that are booked: notifications do not arrive.",
    ["outcome"],
)
PAYMENTS_NOT_CREDITED = Counter(
    "gptutor_payments_not_credited",
    "Payments that were not credited, by reason: not_found, currency, test, account (it was lost by a restore), conflict, "
    "given_up. The log has each. Alert on any but not_found.",
    ["reason"],
)


async def show_metrics(request: web.Request) -> web.Response:
    return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})


def build_metrics() -> web.Application:
    """The application that serves `GET /metrics`."""
    app = web.Application()
    app.router.add_get("/metrics", show_metrics)
    return app
