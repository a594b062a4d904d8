"""Figures for the operator's monitoring, in Prometheus's form (contract F11); what each means stands in its help text.

They are served on a listener of their own, off unless `metrics.port` is set: who asks how much, and how often it fails, is not
for the public.
"""

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, Histogram, generate_latest

COMPLETIONS = Counter(
    "gptutor_completions",
    "Chat completions that have ended, by outcome: settled, released, awaiting_evidence, or a code.",
    ["outcome"],
)
COMPLETION_SECONDS = Histogram(
    "gptutor_completion_seconds",
    "From the request's arrival until its money is closed.",
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)
IN_FLIGHT = Gauge("gptutor_in_flight", "Requests whose money is not closed yet.")
REFUSALS = Counter("gptutor_refusals", "Answers of refusal, by their code.", ["code"])
MALFORMED_REQUESTS = Counter("gptutor_malformed_requests", "Requests that were not HTTP.")
SLOW_HEADS = Counter("gptutor_slow_heads", "Connections closed because the head of a request did not come in time.")
SLOW_PARSES = Counter("gptutor_slow_parses", "Requests so large that they were checked beside the event loop.")
CALLERS_DROPPED = Counter("gptutor_callers_dropped", "Streams whose caller stopped reading, or left.")
UPSTREAM_FAILURES = Counter(
    "gptutor_upstream_failures", "Attempts that OpenRouter did not answer, by kind and status.", ["kind", "status"]
)
UPSTREAM_RETRIES = Counter("gptutor_upstream_retries", "Second and later attempts at one request.")
UPSTREAM_ACCOUNT = Counter(
    "gptutor_upstream_account_refusals",
    "OpenRouter's refusals of our own account: its key, its credit, its limits. Look at once.",
    ["status"],
)
CLOCK_SKEW = Gauge("gptutor_clock_skew_seconds", "Our clock less that of OpenRouter's answers; sign-in by VK needs it right.")
BROKEN_ACCOUNTS = Gauge(
    "gptutor_broken_accounts",
    "Accounts whose balance is not the sum of their entries, or whose reserve is not that of their open holds. Look at once.",
)
CATALOGUE_AGE = Gauge("gptutor_catalogue_age_seconds", "Since the model list was read from OpenRouter.")
PAYMENT_NOTIFICATIONS = Counter(
    "gptutor_payment_notifications",
    "Notifications of the payment provider, by outcome: booked, nothing, unavailable, conflict.",
    ["outcome"],
)


async def show(request: web.Request) -> web.Response:
    return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})


def build_metrics() -> web.Application:
    """The page as an application of its own."""
    app = web.Application()
    app.router.add_get("/metrics", show)
    return app
