"""All metrics (contract F11). Each one's help text says what it means, and what to do about it where something has to be done.

No client chooses the values of a label: models are those of OpenRouter's list (`model_labels.py`), the rest is `other`. Every
counter is present with 0 from the start, because a rate needs a value from before the first increase. The client library adds
`_total` to the names of counters.

A scrape adds up the counters and histograms of all processes, also of those that have ended, and shows one gauge for all living
ones: the largest, unless it is in SUMMED or SMALLEST (`shared_metrics.py`).
"""

from prometheus_client import Counter, Gauge

from gptutor.errors import ERRORS
from gptutor.telemetry.loop_metrics import LoopCounter, LoopHistogram, OptionalGauge

SUMMED = frozenset(
    {
        "gptutor_in_flight_requests",
        "gptutor_journal_bytes",
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
    }
)
"""Gauges of which all processes have a part."""
SMALLEST = frozenset(
    {"process_start_time_seconds", "gptutor_openrouter_limit_left_dollars", "gptutor_openrouter_credit_left_dollars"}
)

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
OUTCOMES = ("settled", "released", "awaiting_evidence")
REFUSED_BELOW = 500
OUTCOME_GROUPS = {
    **{outcome: outcome for outcome in OUTCOMES},
    **{code: "refused" if error.status < REFUSED_BELOW else "failed" for code, error in ERRORS.items()},
}
"""The label `outcome` of a histogram: error codes are `refused` below 500, and `failed` from there on."""
STREAM = {True: "true", False: "false"}


def _counter(name: str, documentation: str, label: str = "", values: tuple[str, ...] = ()) -> Counter:
    """A counter for any thread, with the values of its one label."""
    counter = Counter(name, documentation, [label] if label else [])
    for value in values:
        counter.labels(value)
    return counter


# -- requests

COMPLETIONS = LoopCounter(
    "gptutor_completions",
    "Finished chat completion requests, by outcome: settled, released, awaiting_evidence, or an error code.",
    ["outcome"],
    [(outcome,) for outcome in OUTCOME_GROUPS],
)
COMPLETION_DURATION = LoopHistogram(
    "gptutor_completion_duration_seconds",
    "Time from the arrival of a chat completion request until its response has ended; closing its hold comes after that. "
    "By model family, stream and outcome (refused: an error below 500; failed: another error).",
    ["family", "stream", "outcome"],
    bounds=SECONDS,
)
FIRST_BYTE = LoopHistogram(
    "gptutor_first_byte_seconds",
    "Time from the arrival of a chat completion request until the first byte of its response, by model family, stream, outcome. "
    "Without streaming that is the whole response.",
    ["family", "stream", "outcome"],
    bounds=SECONDS,
)
OVERHEAD = LoopHistogram(
    "gptutor_overhead_seconds",
    "What the gateway itself adds to the time to the first byte: from the arrival of a request until OpenRouter is called, "
    "which is mostly the hold. Above 0.1 s: see the statements, the pool and the event loop.",
    bounds=SHORT_SECONDS,
)
UPSTREAM_FIRST_BYTE = LoopHistogram(
    "gptutor_upstream_first_byte_seconds",
    "OpenRouter's part of the time to the first byte: from the call until the headers of the response, with retries and the wait "
    "for a connection. By model family.",
    ["family"],
    bounds=SECONDS,
)
IN_FLIGHT_REQUESTS = Gauge(
    "gptutor_in_flight_requests", "Chat completion requests whose hold is not yet settled, released or handed over to recovery."
)
DISCONNECTED_CLIENTS = _counter(
    "gptutor_disconnected_clients", "Streamed responses whose client disconnected or stopped reading before the end."
)
HTTP_REQUESTS = LoopCounter(
    "gptutor_http_requests",
    "All requests, by route and status. Paths without a route are `unknown`; the status `disconnected` is a client that "
    "went before the response.",
    ["route", "status"],
)
ERROR_RESPONSES = _counter("gptutor_errors", "Error responses, by error code.", "code", tuple(ERRORS))
MALFORMED_REQUESTS = _counter("gptutor_malformed_requests", "Requests that could not be parsed as HTTP.")
HEADER_TIMEOUTS = _counter(
    "gptutor_header_timeouts", "Connections closed because the headers of a request did not arrive within the timeout."
)
REJECTED_CONNECTIONS = _counter(
    "gptutor_rejected_connections",
    "Connections closed at once, by reason: limit (too many in all or from one address), descriptors (hardly any are left).",
    "reason",
    ("limit", "descriptors"),
)
OFFLOADED_PARSES = _counter(
    "gptutor_offloaded_parses", "Request bodies so large that they were parsed in a thread instead of the event loop."
)

# -- what is sold

TOKENS = LoopCounter(
    "gptutor_tokens", "Charged tokens, by model and direction: in (prompt), out (completion).", ["model", "direction"]
)
COST_DOLLARS = LoopCounter(
    "gptutor_cost_dollars", "What OpenRouter billed for charged requests, in dollars, by model.", ["model"]
)
CHARGES_ROUBLES = LoopCounter("gptutor_charges_roubles", "What users were charged, in roubles, by model.", ["model"])
BOOKINGS_ROUBLES = LoopCounter(
    "gptutor_bookings_roubles",
    "Roubles booked by payments and by the administrators' API, by kind and direction: to (the user), from (the user). "
    "What the command line books is not in it, because it is a process of its own.",
    ["kind", "direction"],
    [("topup", "to"), ("bonus", "to"), *((kind, way) for kind in ("refund", "adjustment") for way in ("to", "from"))],
)
BALANCES_ROUBLES = OptionalGauge(
    "gptutor_balances_roubles",
    "Sum of all users' balances in roubles, by sign: positive (what the operator owes), negative (what users owe). It is read in "
    "parts of 5000 users, one every 15 seconds.",
    ["sign"],
)
CHARGE_OVERRUNS = _counter(
    "gptutor_charge_overruns",
    "Charges above their holds: OpenRouter billed more than its list allows. Alert on any increase.",
)

# -- OpenRouter

UPSTREAM_STATUSES = frozenset(
    {"", "400", "401", "402", "403", "404", "408", "413", "422", "429", "500", "502", "503", "504", "524", "529"}
)
OTHER_STATUS = "other"
UPSTREAM_FAILURES = LoopCounter(
    "gptutor_upstream_failures",
    "Failed attempts to call OpenRouter, by kind of failure and HTTP status.",
    ["kind", "status"],
    [
        *((kind, "") for kind in ("unreachable", "timeout", "broken")),
        *(("status", status) for status in sorted({*UPSTREAM_STATUSES, OTHER_STATUS} - {""})),
    ],
)
UPSTREAM_RETRIES = _counter("gptutor_upstream_retries", "Second and later attempts to call OpenRouter for one request.")
UPSTREAM_ACCOUNT_ERRORS = _counter(
    "gptutor_upstream_account_errors",
    "Errors of OpenRouter about the operator's own account: key, credit or limits. Alert on any increase.",
    "status",
    ("401", "402", "403"),
)
CLOCK_SKEW = Gauge(
    "gptutor_clock_skew_seconds",
    "Local clock minus the clock of OpenRouter, by the Date header of its responses. Sign-in with VK needs a correct clock.",
)
CATALOGUE_AGE = Gauge("gptutor_catalogue_age_seconds", "Time since the model list was last read from OpenRouter.")

# -- holds and their evidence

OPEN_HOLDS = OptionalGauge("gptutor_open_holds", "Holds that are neither settled nor released, in all processes.")
WAITING_HOLDS = OptionalGauge(
    "gptutor_waiting_holds", "Open holds whose request has ended and whose cost is not known: recovery looks for evidence."
)
WAITING_ROUBLES = OptionalGauge("gptutor_waiting_holds_roubles", "What these holds amount to, in roubles.")
WAITING_OLDEST = OptionalGauge(
    "gptutor_waiting_holds_oldest_seconds", "The age of the oldest of them. After recovery.give_up_s it is given up."
)
HOLDS_GIVEN_UP = _counter(
    "gptutor_holds_given_up",
    "Holds that recovery released because nobody learnt what they bought: the operator's loss. Alert on any increase.",
)
SETTLE_LAG = LoopHistogram(
    "gptutor_settle_seconds",
    "Time from the end of a response until its hold is settled, released or handed over. It grows while PostgreSQL is away.",
    bounds=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30, 120, 600),
)
LOST_COMMITS = _counter(
    "gptutor_lost_commits",
    "Closed holds that the database had lost, as by a restore or a promotion, and that were closed again by the journal. "
    "Alert on any increase.",
)
UNBOOKED_CHARGES = _counter(
    "gptutor_unbooked_charges",
    "Requests that cannot be charged, because the database has lost their account: gptutor reconcile lists them. "
    "Alert on any increase.",
)
INCONSISTENT_ACCOUNTS = Gauge(
    "gptutor_inconsistent_accounts",
    "Accounts whose balance is not the sum of their ledger entries, or whose held amount is not the sum of their open holds. "
    "Alert on any.",
)
LAST_RELOAD_SUCCESS = Gauge(
    "gptutor_last_reload_success",
    "1: the last reload, or the start, took the settings over. 0: the previous ones stay in effect, and the log says why. "
    "Alert on 0.",
)
LAST_RELOAD_TIMESTAMP = Gauge(
    "gptutor_last_reload_timestamp_seconds", "When the last reload, or the start, was tried: Unix time."
)

# -- payments

NOT_CREDITED = ("not_found", "currency", "test", "account", "conflict", "given_up")
PAYMENT_OUTCOMES = ("booked", "nothing", "pending", "unavailable", *NOT_CREDITED)
PAYMENT_NOTIFICATIONS = _counter(
    "gptutor_payment_notifications",
    "Notifications from the payment provider, by outcome: booked, nothing, pending (to be repeated), unavailable, or a reason of "
    "gptutor_payments_not_credited.",
    "outcome",
    PAYMENT_OUTCOMES,
)
PAYMENT_LOOKUPS = _counter(
    "gptutor_payment_lookups",
    "Look-ups of payments that have not ended, by outcome as above. Many that are booked: notifications do not arrive.",
    "outcome",
    PAYMENT_OUTCOMES,
)
PAYMENTS_NOT_CREDITED = _counter(
    "gptutor_payments_not_credited",
    "Payments that were not credited, by reason: not_found, currency, test, account (it was lost by a restore), conflict, "
    "given_up. The log has each. Alert on any but not_found.",
    "reason",
    NOT_CREDITED,
)

# -- PostgreSQL and the journal

DATABASE_UP = OptionalGauge(
    "gptutor_database_up", "Whether PostgreSQL answered the latest question, which comes every 15 seconds. Alert on 0."
)
BATCH_ITEMS = LoopHistogram(
    "gptutor_batch_items",
    "Holds and settlements that shared one statement and commit. It grows with the load.",
    bounds=(1, 2, 4, 8, 16, 32, 64, 128, 200),
)
STATEMENT_DURATION = LoopHistogram(
    "gptutor_statement_seconds",
    "Time of statements in PostgreSQL, by name, without those that failed.",
    ["statement"],
    bounds=SHORT_SECONDS,
)
POOL_WAIT = LoopHistogram(
    "gptutor_pool_wait_seconds",
    "Time that a statement waited for a connection, where none was idle. Many long waits: raise database.connections_max.",
    bounds=SHORT_SECONDS,
)
JOURNAL_BYTES = Gauge(
    "gptutor_journal_bytes", "The journals' size: it grows while PostgreSQL is away, and is small again when it is back."
)
JOURNAL_FILLED = Gauge(
    "gptutor_journal_filled_ratio",
    "The size of the fullest journal as a part of recovery.journal_bytes_max; at 1 requests are rejected with 503.",
)

# -- processes

BUILD_INFO = Gauge(
    "gptutor_build_info", "1, with the version, Python's version and the commit, if it is known.", ["version", "python", "commit"]
)
PROCESSES = OptionalGauge(
    "gptutor_processes",
    "Processes of the service, by state: answering, silent (it did not answer the scrape within a second; its latest values are "
    "shown). Alert on silent ones.",
    ["state"],
)
PROCESS_STARTS = _counter("gptutor_process_starts", "Processes of the service that were started.")
PROCESS_DEATHS = _counter(
    "gptutor_process_deaths",
    "Processes of the service that ended without stopping: killed, out of memory, crashed, or the machine was. Each is replaced. "
    "Alert on several.",
)
EVENT_LOOP_LAG = Gauge(
    "gptutor_event_loop_lag_seconds",
    "The longest that any process's event loop came late in the last half minute. Meanwhile nobody is served: alert above 1.",
)
LOG_LINES_LOST = _counter(
    "gptutor_log_lines_lost",
    "Log lines that could not be written, by destination: file (a full disk), stdout, stderr (a reader that does not read).",
    "destination",
    ("file", "stdout", "stderr"),
)


# -- our account at OpenRouter, and alerts

OPENROUTER_LIMIT = OptionalGauge(
    "gptutor_openrouter_limit_dollars", "The limit of our API key at OpenRouter; +Inf: none; absent until it was read."
)
OPENROUTER_LIMIT_LEFT = OptionalGauge(
    "gptutor_openrouter_limit_left_dollars", "What is left of the limit of our API key; +Inf: no limit; absent until it was read."
)
OPENROUTER_CREDIT_LEFT = OptionalGauge(
    "gptutor_openrouter_credit_left_dollars",
    "What is left of our credit at OpenRouter; absent until it was read, which takes openrouter.management_key.",
)
OPENROUTER_REFUSES = Gauge(
    "gptutor_openrouter_refuses", "1 while OpenRouter refuses our account, and completions are rejected with 503. Alert on 1."
)
ALERTS_ON = Gauge("gptutor_alerts_on", "Conditions that this process finds wrong now; gptutor alerts lists them.")
ALERTS_SENT = _counter(
    "gptutor_alerts_sent",
    "Alerts, by outcome: sent, failed (given up, and in the log). Look at the settings if any failed.",
    "outcome",
    ("sent", "failed"),
)


def status_label(status: int) -> str:
    """OpenRouter's status as a label: those that are not listed are `other`, and 0, no status, is empty."""
    shown = str(status or "")
    return shown if shown in UPSTREAM_STATUSES else OTHER_STATUS
