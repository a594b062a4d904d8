"""One request's whole life, in one object and one task: hold → upstream → relay → charge → settle → log.

The task belongs to the application, not to the client's connection. The handler only waits for the future `response`. When the
client disconnects, the handler is cancelled, which cancels `response`: the exchange then knows that the client has gone. The
purchase goes on: upstream is read to its end for a bounded time, and the hold is closed by evidence.

Everything that is known about the purchase is recorded in `purchase.py` and, a moment earlier, in the journal: wherever this code
is interrupted, the hold is closed by that evidence.
"""

import asyncio
import contextlib
import logging
import time

from aiohttp import web

from gptutor.api.chat.context import RequestContext, Services
from gptutor.api.chat.errors import error_for_hold, error_for_upstream
from gptutor.api.chat.event_stream import EventStream
from gptutor.api.chat.exchange_metrics import ExchangeTimes, count_exchange
from gptutor.api.chat.purchase import Purchase
from gptutor.api.verified_keys import hide_duration
from gptutor.database.errors import DatabaseUnavailable
from gptutor.errors import DO_NOT_RETRY, ApiError
from gptutor.http.address_limits import caller_of
from gptutor.http.app_keys import KEY_VERIFIED, LOGGED
from gptutor.http.byte_budget import BudgetExceeded, ResponseBytes, TooLarge
from gptutor.http.unbuffered_response import CompleteResponse
from gptutor.money.amounts import roubles
from gptutor.money.holds import Hold, HoldId, HoldRejected, HoldRequest, UnknownKey, new_id
from gptutor.money.journal import JournalError
from gptutor.money.pricing import Ceiling
from gptutor.openrouter.bill import BillScanner, read_usage_report
from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.relay import relay
from gptutor.openrouter.response import UpstreamResponse

LOGGER = logging.getLogger("gptutor.exchange")

RELEASE_S = 1.0
"""How long a client with an idempotency key waits for its error, so that the key is free when it repeats the request."""
MARK_AT_STOP_S = 0.5
"""How long a response waits for the database when the service stops: it must leave before the connections are closed."""

# Without `choices`: with them, several clients take the event for the regular end of a response.
TRUNCATED_EVENT = (
    b'data: {"error":{"code":502,"message":"The upstream connection was lost before the response was complete"}}\n\n'
)
STOPPED_EVENT = b'data: {"error":{"code":503,"message":"The service stopped before the response was complete"}}\n\n'


def start_exchange(services: Services, request: web.Request, context: RequestContext) -> asyncio.Future[web.StreamResponse]:
    """Starts an exchange, and returns the future of its response; cancelling the future means that the client disconnected."""
    exchange = Exchange(services, request, context)
    services.in_flight.start(exchange.run())
    return exchange.response


class Exchange:
    def __init__(self, services: Services, request: web.Request, context: RequestContext) -> None:
        self.response: asyncio.Future[web.StreamResponse] = asyncio.get_running_loop().create_future()
        self._services = services
        self._request = request
        self._context = context
        self._parsed = context.parsed
        self._started = time.monotonic()
        self._ended: float | None = None
        self._called_at: float | None = None
        self._answered_at: float | None = None
        """When OpenRouter was called, and when the headers of its response were here."""
        self._downstream: EventStream | None = None
        self._scanner: BillScanner | None = None
        self._purchase: Purchase | None = None
        self._drain_timer: asyncio.TimerHandle | None = None
        # for the log
        self._is_request_logged = False
        self._outcome = "internal_error"
        self._cause: str | None = None
        self._refusal: str | None = None
        """The code of the error, if nothing was held for the request."""

    async def run(self) -> None:
        hold_id = new_id()
        self._services.exchanges.add(self)
        try:
            await self._hold_buy_and_settle(hold_id)
        finally:
            self._services.exchanges.discard(self)
            self._services.ledger.deactivate(hold_id)
            self._parsed.members.clear()
            self._context.body_share.release()
            self.end_response()  # nothing is left to do if it has ended; otherwise this task is being cancelled
            if self._is_request_logged:
                self._log_response()

    async def end_at_stop(self) -> None:
        """Ends the response; if something may have been bought, once a repeat of the request would be recognised."""
        if self._purchase is not None and self._is_sent and not self._has_started and not self.response.done():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MARK_AT_STOP_S):
                    await self._purchase.mark_outcome_unknown(self._context.body_hash)
        self.end_response()

    def end_response(self) -> None:
        """Ends the response now, because the service stops: an empty one would be requested again, and bought twice.

        The purchase goes on as after a disconnect. What is not sent upstream yet is not sent any more.
        """
        if self.response.done():
            return
        cause = "the service stopped before the response was complete"
        downstream, scanner = self._downstream, self._scanner
        if downstream is None or scanner is None or not downstream.has_started:
            code, headers = ("upstream_timeout", DO_NOT_RETRY) if self._is_sent else ("not_ready", None)
            self._respond_with_error(ApiError(code, cause=cause, headers=headers))
            return
        self._outcome, self._cause = "awaiting_evidence", cause
        if "Content-Encoding" in downstream.response.headers:
            downstream.abort()  # nothing can be added to compressed bytes
            self.response.cancel()
        else:
            event = STOPPED_EVENT if scanner.at_event_boundary else b"\n\n" + STOPPED_EVENT
            downstream.end(b"" if scanner.has_seen_end else event)
            self.response.set_result(downstream.response)

    async def _hold_buy_and_settle(self, hold_id: HoldId) -> None:
        try:
            ceiling = self._ceiling()
            hold = await self._hold_funds(hold_id, ceiling)
            self._purchase = Purchase(self._services.ledger, self._services.evaluate, hold)
            await self._buy(hold, self._purchase, ceiling)
        except ApiError as error:
            await self._prepare_for_repeat()
            self._respond_with_error(error)
        except Exception as error:
            await self._prepare_for_repeat()
            self._respond_with_internal_error(error)
        self._ended = time.monotonic()
        if self._purchase is not None:
            try:
                self._set_outcome(await self._purchase.close())
            except Exception as error:
                self._respond_with_internal_error(error)  # the hold stays open; the journal has the evidence to close it

    # -- before anything is bought

    def _ceiling(self) -> Ceiling:
        models = (self._parsed.model, *self._parsed.fallbacks)
        catalogue = self._services.catalogue
        return self._services.evaluate.ceiling(self._parsed.size, [catalogue.price(model) for model in models])

    async def _hold_funds(self, hold_id: HoldId, ceiling: Ceiling) -> Hold:
        request = HoldRequest(
            claim=self._context.claim,
            hold_id=hold_id,
            ceiling=ceiling,
            model=self._parsed.model,
            request_id=self._context.request_id,
            idempotency_key=self._context.idempotency_key,
            body_hash=self._context.body_hash,
        )
        verified_keys = self._services.verified_keys
        try:
            hold = await self._services.ledger.hold_funds(request)
        except HoldRejected as error:
            rejection = error_for_hold(error, self._services.rate_limit)
            if isinstance(error, UnknownKey):
                verified_keys.discard(self._context.claim)
                await hide_duration(self._started)
            else:
                verified_keys.add(self._context.claim, is_fresh=False)
                self._request[KEY_VERIFIED] = True
                self._refusal = rejection.code
                self._log_request()  # an unauthenticated request must not be logged under an account's id
            raise rejection from None
        except DatabaseUnavailable as error:
            raise ApiError("database_unavailable", cause=str(error)) from error
        verified_keys.add(self._context.claim)
        self._services.refusals.take_back(self._context.counted_as, self._context.weight)
        self._log_request()
        return hold

    # -- between upstream and downstream

    async def _buy(self, hold: Hold, purchase: Purchase, ceiling: Ceiling) -> None:
        """Requests a completion and relays it, recording the evidence of the purchase."""
        if self.response.done():
            return
        body = [
            self._parsed.upstream_body(
                user=self._services.pseudonym(hold.account_id),
                output_limit=ceiling.output_limit(hold.amount),
                price_cap=ceiling.price_cap,
                tool_steps=ceiling.tool_steps,
            )
        ]
        self._parsed.members.clear()  # the body is in memory once from here on, and not twice
        self._called_at = time.monotonic()
        try:
            upstream, left_s = await self._services.upstream.complete(
                body.pop(),  # no variable here keeps it while the response is read
                self._context.forwarded_headers,
                stream=self._parsed.stream,
                is_wanted=lambda: not self.response.done(),
                before_attempt=purchase.mark_sent,
                nothing_bought=purchase.mark_not_sent,
            )
            self._answered_at = time.monotonic()
            self._context.body_share.release()
            try:
                if not upstream.connection.is_finished:  # a finished response states its bill in the next moment
                    purchase.record_generation_id(upstream.generation_id)
                if upstream.is_event_stream:
                    await self._relay_stream(hold, purchase, upstream)
                else:
                    await self._relay_document(hold, purchase, upstream, left_s)
            finally:
                upstream.close()
        except JournalError as error:
            LOGGER.error("%s", error)
            raise ApiError("journal_unavailable", cause=str(error)) from error
        except UpstreamError as error:
            purchase.record_generation_id(error.failure.generation_id)
            raise error_for_upstream(error, self._context.request_id) from error

    async def _relay_document(self, hold: Hold, purchase: Purchase, upstream: UpstreamResponse, left_s: float) -> None:
        """Raises UpstreamError, and ApiError if the response cannot be kept in memory."""
        services = self._services
        kept = ResponseBytes(services.answer_budget, hold.account_id, services.answer_bytes_max)
        try:
            document = await upstream.read_body(left_s, kept.count)
        except (TooLarge, BudgetExceeded) as error:
            purchase.record_generation_id(upstream.generation_id)
            raise ApiError("upstream_outcome_unknown", cause=f"the response is not kept: {type(error).__name__}") from None
        report = read_usage_report(document)
        if report.bill is not None:
            purchase.record_bill(report.bill, upstream.generation_id)
        else:
            purchase.record_generation_id(upstream.generation_id or report.generation_id)
        if not self.response.done():
            headers = self._client_headers(hold, upstream)
            self.response.set_result(
                CompleteResponse(
                    document,
                    status=upstream.status,
                    headers=headers,
                    kept=kept,
                    write_timeout_s=services.stream_limits.write_timeout_s,
                )
            )

    async def _relay_stream(self, hold: Hold, purchase: Purchase, upstream: UpstreamResponse) -> None:
        """Raises UpstreamError if nothing has been written to the client yet."""
        limits = self._services.stream_limits
        scanner = self._scanner = BillScanner(upstream.generation_id)
        downstream = self._downstream = EventStream(self._request, self.response, self._client_headers(hold, upstream), limits)
        self.response.add_done_callback(lambda _: self._limit_drain(upstream))
        try:
            try:
                error = await relay(
                    upstream,
                    downstream,
                    scanner,
                    lambda bill: purchase.record_bill(bill, upstream.generation_id),
                    heartbeat_s=limits.heartbeat_s,
                )
            finally:
                purchase.record_generation_id(scanner.generation_id)
            downstream.detach_upstream()
            upstream.close()  # other requests may use the connection while the client takes the rest
            if error is not None and not downstream.has_started:
                raise error
            is_complete = scanner.has_seen_end or (error is None and scanner.is_complete)
            if upstream.is_encoded and error is not None:
                self._cause = f"upstream, in mid-stream: {error}"
                downstream.abort()
            elif not (upstream.is_encoded or is_complete or self.response.done()):
                self._cause = f"upstream, in mid-stream: {error or 'the stream ended too early'}"
                downstream.write(TRUNCATED_EVENT if scanner.at_event_boundary else b"\n\n" + TRUNCATED_EVENT)
            await downstream.finish()
        finally:
            if self._drain_timer is not None:
                self._drain_timer.cancel()
            downstream.close()
        if not self.response.done():
            self.response.set_result(downstream.response)

    def _client_headers(self, hold: Hold, upstream: UpstreamResponse) -> dict[str, str]:
        return {**upstream.client_headers, **self._services.rate_limit.headers(hold.minute_requests)}

    def _limit_drain(self, upstream: UpstreamResponse) -> None:
        """If the response ended before upstream did, the rest of the stream is read for its bill, for a bounded time."""
        if not upstream.is_closed:
            limit_s = self._services.stream_limits.disconnected_drain_s
            self._drain_timer = self.response.get_loop().call_later(limit_s, self._stop_drain, upstream)

    def _stop_drain(self, upstream: UpstreamResponse) -> None:
        limit_s = self._services.stream_limits.disconnected_drain_s
        self._cause = self._cause or f"the client disconnected, and upstream went on for more than {limit_s} s"
        upstream.finish_early()

    # -- errors, the outcome, the log

    @property
    def _is_sent(self) -> bool:
        return self._purchase is not None and self._purchase.is_sent

    @property
    def _has_started(self) -> bool:
        return self._downstream is not None and self._downstream.has_started

    def _set_outcome(self, outcome: str) -> None:
        """The outcome is what became of the hold, unless the client got an error: then its code stays the outcome."""
        if outcome == "awaiting_evidence":
            self._cause = self._cause or "the response states no cost"
        if not self.response.done() or self.response.cancelled() or self.response.exception() is None:
            self._outcome = outcome

    async def _prepare_for_repeat(self) -> None:
        """To be awaited before the client learns that its request has failed: it may repeat the request at once.

        If something may have been bought, the repeat will be rejected; otherwise its idempotency key is free for it. A client
        that has the beginning of a stream, or has gone, does not repeat the request by itself.
        """
        if self._purchase is None or self._has_started or self.response.done():
            return
        if self._purchase.is_sent:
            await self._purchase.mark_outcome_unknown(self._context.body_hash)
        elif self._context.idempotency_key is not None:
            with contextlib.suppress(Exception):  # the hold is closed again later, and then what fails is reported
                async with asyncio.timeout(RELEASE_S):
                    await self._purchase.close()

    def _respond_with_error(self, error: ApiError) -> None:
        self._outcome = error.code
        self._cause = error.cause
        # Its tracebacks refer to this exchange, which refers to the error: the body would wait for the garbage collector.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        if self.response.done():
            return
        if self._downstream is not None and self._has_started:
            self._downstream.abort()  # too late for an error response: a broken connection shows the failure
            self.response.cancel()
        else:
            self.response.set_exception(error)

    def _respond_with_internal_error(self, error: Exception) -> None:
        LOGGER.exception("An exchange failed", extra={"requestId": self._context.request_id})
        headers = DO_NOT_RETRY if self._is_sent else None
        self._respond_with_error(ApiError("internal_error", cause=repr(error), headers=headers))

    def _log_request(self) -> None:
        self._request[LOGGED] = self._is_request_logged = True
        self._services.log.llm_request(
            model=self._parsed.model,
            user_id=self._context.claim.account_id,
            request_id=self._context.request_id,
            stream=self._parsed.stream,
            messages=self._parsed.message_count,
            refusal=self._refusal,
        )

    def _log_response(self) -> None:
        purchase = self._purchase
        charge = purchase.charge if purchase else None
        now = time.monotonic()
        count_exchange(
            self._parsed.model,
            stream=self._parsed.stream,
            outcome=self._outcome,
            times=ExchangeTimes(
                arrived=self._started,
                called=self._called_at,
                answered=self._answered_at,
                first_byte=self._downstream.started_at if self._downstream is not None else None,
                ended=self._ended or now,
                closed=now,
            ),
        )
        self._services.log.llm_response(
            model=self._parsed.model,
            user_id=self._context.claim.account_id,
            request_id=self._context.request_id,
            stream=self._parsed.stream,
            outcome=self._outcome,
            duration_ms=round((now - self._started) * 1000),
            generation_id=purchase.generation_id if purchase else None,
            prompt_tokens=charge.prompt_tokens if charge else None,
            completion_tokens=charge.completion_tokens if charge else None,
            cost_usd=charge.cost_usd if charge else None,
            cost_rub=roubles(charge.amount) if charge else None,
            cause=self._cause,
            caller=None if self._cause is None else caller_of(self._request),
            refusal=self._refusal,
        )
