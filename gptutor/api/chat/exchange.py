"""One request's whole life, in one object and one task: hold → upstream → relay → charge → settle → log.

The task belongs to the application, not to the connection. The handler only waits for `answer`; when the caller leaves, the
handler is cancelled, which cancels `answer`, and that is how the exchange knows that nobody listens. The money goes on: upstream
is read to its end for a bounded time, and the hold is closed by evidence.

What is known of the purchase stands in `purchase.py` and, a moment earlier, in the journal: wherever this code is broken off,
the hold is closed by that.
"""

import asyncio
import functools
import logging
import time

from aiohttp import web

from gptutor.api.chat.context import RequestContext, Services
from gptutor.api.chat.event_stream import EventStream
from gptutor.api.chat.hold_errors import hold_error
from gptutor.api.chat.purchase import Purchase
from gptutor.api.chat.upstream_errors import to_api_error
from gptutor.database.errors import DatabaseUnavailable
from gptutor.errors import DO_NOT_RETRY, ApiError
from gptutor.http.middlewares import LOGGED
from gptutor.http.response_head import CompleteResponse
from gptutor.money.amounts import roubles
from gptutor.money.holds import Hold, HoldId, HoldRequest, NotHeld, UnknownKey, new_id
from gptutor.money.journal import JournalError
from gptutor.money.pricing import Ceiling
from gptutor.openrouter.bill import BillScanner, read_usage_report
from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.relay import relay
from gptutor.openrouter.response import UpstreamResponse
from gptutor.telemetry.metrics import COMPLETION_DURATION, COMPLETIONS

LOGGER = logging.getLogger("gptutor.exchange")

outcome_counted = functools.cache(COMPLETIONS.labels)

# OpenRouter's own form of an error in the middle of a stream.
TRUNCATED = (
    b'data: {"error":{"code":502,"message":"The upstream connection was lost before the answer was complete"},'
    b'"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error"}]}\n\n'
)


def begin(kit: Services, request: web.Request, order: RequestContext) -> asyncio.Future[web.StreamResponse]:
    """Starts an exchange, and gives the future of its answer; cancelling it means that the caller has left."""
    exchange = Exchange(kit, request, order)
    kit.in_flight.start(exchange.run())
    return exchange.answer


class Exchange:
    def __init__(self, kit: Services, request: web.Request, order: RequestContext) -> None:
        self.answer: asyncio.Future[web.StreamResponse] = asyncio.get_running_loop().create_future()
        self._kit = kit
        self._request = request
        self._order = order
        self._started = time.monotonic()
        self._downstream: EventStream | None = None
        self._purchase: Purchase | None = None
        self._hurries: asyncio.TimerHandle | None = None
        # what is told of it
        self._is_logged = False
        self._outcome = "internal_error"
        self._cause: str | None = None

    async def run(self) -> None:
        hold_id = new_id()
        try:
            await self._trade(hold_id)
        finally:
            self._kit.ledger.let_go(hold_id)
            if not self.answer.done():  # this task is being cut off
                self._refuse(ApiError("not_ready", cause="cut off at the end", headers=DO_NOT_RETRY if self._is_sent else None))
            if self._is_logged:
                self._log_response()

    async def _trade(self, hold_id: HoldId) -> None:
        try:
            ceiling = self._ceiling()
            hold = await self._hold(hold_id, ceiling)
            self._purchase = Purchase(self._kit.ledger, self._kit.evaluate, hold)
            await self._converse(hold, self._purchase, ceiling)
        except ApiError as refusal:
            self._refuse(refusal)
        except Exception as error:
            self._fail(error)
        if self._purchase is not None:
            try:
                self._end(await self._purchase.close())
            except Exception as error:
                self._fail(error)  # the hold is open, and the journal knows what it needs

    # -- before anything is bought

    def _ceiling(self) -> Ceiling:
        models = (self._order.ask.model, *self._order.ask.fallbacks)
        return self._kit.evaluate.ceiling(self._order.ask.size, [self._kit.catalogue.price(model) for model in models])

    async def _hold(self, hold_id: HoldId, ceiling: Ceiling) -> Hold:
        order = self._order
        request = HoldRequest(
            order.claim, hold_id, ceiling, order.ask.model, order.request_id, order.idempotency_key, order.body_hash
        )
        try:
            hold = await self._kit.ledger.hold_funds(request)
        except NotHeld as error:
            if not isinstance(error, UnknownKey):  # nobody's request leaves no line in anybody's name
                self._log_request()
            raise hold_error(error, self._kit.pace) from None
        except DatabaseUnavailable as error:
            raise ApiError("database_unavailable", cause=str(error)) from error
        self._log_request()
        return hold

    # -- between upstream and downstream

    async def _converse(self, hold: Hold, purchase: Purchase, ceiling: Ceiling) -> None:
        """Relays one answer, noting what is learnt about the purchase."""
        body = self._order.ask.upstream_body(
            user=self._kit.pseudonym(hold.account_id), output_limit=ceiling.output_limit(hold.available_before)
        )
        if self._caller_left():
            return
        try:
            reply, left_s = await self._kit.upstream.complete(
                body,
                self._order.headers,
                stream=self._order.ask.stream,
                wanted=lambda: not self._caller_left(),
                attempting=purchase.send,
                refused=purchase.take_back,
            )
        except JournalError as error:
            LOGGER.error("%s", error)
            raise ApiError("journal_unavailable", cause=str(error)) from error
        except UpstreamError as error:
            purchase.name(error.failure.generation_id)
            raise to_api_error(error) from error
        try:
            if not reply.is_whole:  # what is whole names its price in the next moment
                purchase.name(reply.generation_id)
            if reply.is_event_stream:
                await self._relay_stream(hold, purchase, reply)
            else:
                await self._relay_plain(hold, purchase, reply, left_s)
        finally:
            reply.close()

    async def _relay_plain(self, hold: Hold, purchase: Purchase, reply: UpstreamResponse, left_s: float) -> None:
        try:
            document = await reply.read(left_s)
        except UpstreamError as error:
            if purchase.generation_id is None:
                purchase.name(error.failure.generation_id)
            raise to_api_error(error) from error
        said = read_usage_report(document)
        if said.bill is not None:
            purchase.note_bill(said.bill, reply.generation_id)
        elif purchase.generation_id is None:
            purchase.name(reply.generation_id or said.generation_id)
        if not self.answer.done():
            self.answer.set_result(CompleteResponse(document, status=reply.status, headers=self._headers(hold, reply)))

    async def _relay_stream(self, hold: Hold, purchase: Purchase, reply: UpstreamResponse) -> None:
        scanner = BillScanner(reply.generation_id)
        downstream = self._downstream = EventStream(self._request, self.answer, self._headers(hold, reply), self._kit.patience)
        self.answer.add_done_callback(lambda _: self._hurry(reply))
        try:
            error = await relay(
                reply,
                downstream,
                scanner,
                lambda bill: purchase.note_bill(bill, reply.generation_id),
                heartbeat_s=self._kit.patience.heartbeat_s,
            )
            if purchase.generation_id is None:  # before the caller is waited for
                purchase.name(scanner.generation_id)
            downstream.forget_reply()
            reply.close()  # however long the caller takes for the rest, others may have the connection
            if error is not None and not downstream.has_begun:
                raise to_api_error(error) from error
            if reply.is_encoded and error is not None:
                self._cause = f"upstream, in mid-stream: {error}"
                downstream.abort()
            elif not (reply.is_encoded or scanner.has_ended or self._caller_left()):
                self._cause = f"upstream, in mid-stream: {error or 'the end came too early'}"
                downstream.write(TRUNCATED if scanner.at_event_end else b"\n\n" + TRUNCATED)
            await downstream.finish()
        finally:
            if self._hurries is not None:
                self._hurries.cancel()
            if purchase.generation_id is None:
                purchase.name(scanner.generation_id)
            downstream.release()
        if not self.answer.done():
            self.answer.set_result(downstream.response)

    def _headers(self, hold: Hold, reply: UpstreamResponse) -> dict[str, str]:
        return {**reply.headers, **self._kit.pace.headers(hold.minute_requests)}

    def _hurry(self, reply: UpstreamResponse) -> None:
        """Once the caller has left, the rest of the stream is read for its bill, but not for ever."""
        if self._caller_left() and not reply.is_closed:
            self._hurries = self.answer.get_loop().call_later(self._kit.patience.leaver_drain_s, self._give_up, reply)

    def _give_up(self, reply: UpstreamResponse) -> None:
        self._cause = f"the caller left, and upstream went on for more than {self._kit.patience.leaver_drain_s} s"
        reply.stop()

    # -- what is said of it

    @property
    def _is_sent(self) -> bool:
        return self._purchase is not None and self._purchase.is_sent

    def _caller_left(self) -> bool:
        return self.answer.cancelled()

    def _end(self, outcome: str) -> None:
        """What became of the money is the outcome, unless the caller got a refusal: then that is."""
        if outcome == "awaiting_evidence":
            self._cause = self._cause or "the answer states no price"
        if not self.answer.done() or self.answer.cancelled() or self.answer.exception() is None:
            self._outcome = outcome

    def _refuse(self, refusal: ApiError) -> None:
        self._outcome = refusal.code
        self._cause = refusal.cause or refusal.code
        if self.answer.done():
            return
        if self._downstream is not None and self._downstream.has_begun:
            self._downstream.abort()  # too late to refuse: a broken connection is the truth
            self.answer.cancel()
        else:
            self.answer.set_exception(refusal)

    def _fail(self, error: Exception) -> None:
        LOGGER.exception("An exchange failed", extra={"requestId": self._order.request_id})
        self._refuse(ApiError("internal_error", cause=repr(error), headers=DO_NOT_RETRY if self._is_sent else None))

    def _log_request(self) -> None:
        self._request[LOGGED] = self._is_logged = True
        self._kit.log.llm_request(
            model=self._order.ask.model,
            user_id=self._order.claim.account_id,
            request_id=self._order.request_id,
            stream=self._order.ask.stream,
            messages=self._order.ask.messages,
        )

    def _log_response(self) -> None:
        purchase = self._purchase
        price = purchase.price if purchase else None
        duration_s = time.monotonic() - self._started
        outcome_counted(self._outcome).inc()
        COMPLETION_DURATION.observe(duration_s)
        self._kit.log.llm_response(
            model=self._order.ask.model,
            user_id=self._order.claim.account_id,
            request_id=self._order.request_id,
            stream=self._order.ask.stream,
            outcome=self._outcome,
            duration_ms=round(duration_s * 1000),
            generation_id=purchase.generation_id if purchase else None,
            prompt_tokens=price.prompt_tokens if price else None,
            completion_tokens=price.completion_tokens if price else None,
            cost_usd=price.cost_usd if price else None,
            cost_rub=roubles(price.charge) if price else None,
            cause=self._cause,
        )
