"""One request's whole life, in one object and one task: hold → upstream → relay → charge → settle → log.

The task belongs to the application, not to the connection. The handler only waits for `answer`; when the caller leaves, the
handler is cancelled, which cancels `answer`, and that is how the exchange knows that nobody listens. The money goes on: upstream
is read to its end for a bounded time, and the hold is closed by evidence.
"""

import asyncio
import contextlib
import hashlib
import hmac
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from gptutor.api.ask import Ask
from gptutor.api.event_stream import EventStream
from gptutor.api.inflight import InFlight
from gptutor.api.upstream_refusals import refusal_of
from gptutor.database import DatabaseUnavailable
from gptutor.errors import Refusal
from gptutor.logs import LoggerService
from gptutor.money.amounts import AccountId, Nano, roubles
from gptutor.money.keys import KeyClaim
from gptutor.money.ledger import Hold, InsufficientFunds, Ledger, Settlement, UnknownKey, new_id
from gptutor.money.pricing import Ceiling, LLMCostEvaluate
from gptutor.openrouter.bill import Bill, BillScanner, read_bill
from gptutor.openrouter.catalogue import Catalogue
from gptutor.openrouter.relay import relay
from gptutor.openrouter.service import OpenRouterService, Reply, UpstreamError

LOGGER = logging.getLogger("gptutor.exchange")
LOOKUP_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
SETTLE_PAUSES_S = (0.05, 0.2, 1.0, 5.0)

# OpenRouter's own form of an error in the middle of a stream.
TRUNCATED = (
    b'data: {"error":{"code":502,"message":"The upstream connection was lost before the answer was complete"},'
    b'"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error"}]}\n\n'
)


@dataclass(frozen=True, slots=True)
class Bought:
    """What is known about the purchase. No bill and `maybe`: it has to be asked for by `generation_id`, if there is one."""

    maybe: bool
    bill: Bill | None = None
    generation_id: str | None = None


NOTHING = Bought(maybe=False)


@dataclass(frozen=True, slots=True)
class Exchanges:
    """What every exchange uses; made once, at the start of the application."""

    ledger: Ledger
    evaluate: LLMCostEvaluate
    upstream: OpenRouterService
    catalogue: Catalogue
    log: LoggerService
    in_flight: InFlight
    pseudonym_key: bytes
    write_s: float
    leaver_drain_s: float
    lookup_s: float

    def begin(self, request: web.Request, request_id: str, claim: KeyClaim, ask: Ask) -> asyncio.Future[web.StreamResponse]:
        """Starts an exchange, and gives the future of its answer; cancelling it means that the caller has left."""
        exchange = Exchange(self, request, request_id, claim, ask)
        self.in_flight.start(exchange.run())
        return exchange.answer

    def pseudonym(self, account_id: AccountId) -> str:
        """The account's stable name upstream, from which nobody learns the account."""
        return hmac.new(self.pseudonym_key, b"user %d" % account_id, hashlib.sha256).hexdigest()[:32]


class Exchange:
    def __init__(self, kit: Exchanges, request: web.Request, request_id: str, claim: KeyClaim, ask: Ask) -> None:
        self.answer: asyncio.Future[web.StreamResponse] = asyncio.get_running_loop().create_future()
        self._kit = kit
        self._request = request
        self._request_id = request_id
        self._claim = claim
        self._ask = ask
        self._started = time.monotonic()
        self._outcome = "internal_error"
        self._cause: str | None = None
        self._generation_id: str | None = None
        self._bill: Bill | None = None
        self._charge: Nano | None = None

    async def run(self) -> None:
        self._log_request()
        try:
            ceiling = self._ceiling()
            hold = await self._hold(ceiling)
            bought = await self._converse(hold, ceiling)
            await self._close(hold, bought)
        except Refusal as refusal:
            self._refuse(refusal)
        except Exception as error:
            LOGGER.exception("An exchange failed", extra={"requestId": self._request_id})
            self._refuse(Refusal("internal_error", cause=repr(error)))
        finally:
            self._log_response()

    # -- before anything is bought

    def _ceiling(self) -> Ceiling:
        """The dearest of the models that may answer."""
        models = (self._ask.model, *self._ask.fallbacks)
        ceilings = [self._kit.evaluate.ceiling(self._ask.size, self._kit.catalogue.price(model)) for model in models]
        return max(ceilings, key=lambda ceiling: ceiling.most)

    async def _hold(self, ceiling: Ceiling) -> Hold:
        try:
            return await self._kit.ledger.hold_funds(
                self._claim, new_id(), ceiling, model=self._ask.model, request_id=self._request_id
            )
        except UnknownKey:
            raise Refusal("invalid_key") from None
        except InsufficientFunds:
            raise Refusal("insufficient_balance") from None
        except DatabaseUnavailable as error:
            raise Refusal("database_unavailable", cause=str(error)) from error

    # -- between upstream and downstream

    async def _converse(self, hold: Hold, ceiling: Ceiling) -> Bought:
        """Relays one answer, and says what is known about the purchase. Never raises: the hold must be closed."""
        body = self._ask.upstream_body(
            user=self._kit.pseudonym(hold.account_id), output_limit=ceiling.output_limit(hold.available_before)
        )
        if self._caller_left():
            return NOTHING
        try:
            reply, left_s = await self._kit.upstream.complete(
                body, stream=self._ask.stream, wanted=lambda: not self._caller_left()
            )
        except UpstreamError as error:
            self._refuse(refusal_of(error))
            return Bought(maybe=not error.failure.bought_nothing, generation_id=error.failure.generation_id)
        try:
            if reply.is_event_stream:
                return await self._relay_stream(reply)
            return await self._relay_plain(reply, left_s)
        except Exception as error:
            LOGGER.exception("A relay failed", extra={"requestId": self._request_id})
            self._refuse(Refusal("internal_error", cause=repr(error)))
            return Bought(maybe=True, generation_id=reply.generation_id)
        finally:
            reply.close()

    async def _relay_plain(self, reply: Reply, left_s: float) -> Bought:
        try:
            document = await reply.read(left_s)
        except UpstreamError as error:
            self._refuse(refusal_of(error))
            return Bought(maybe=True, generation_id=reply.generation_id)
        bill = read_bill(document)
        if not self.answer.done():
            self.answer.set_result(web.Response(body=document, status=reply.status, headers=reply.headers))
        return Bought(maybe=True, bill=bill, generation_id=reply.generation_id)

    async def _relay_stream(self, reply: Reply) -> Bought:
        scanner = BillScanner()
        downstream = EventStream(self._request, self.answer, reply.headers, self._kit.write_s)
        try:
            async with asyncio.timeout(None) as limit:
                self.answer.add_done_callback(lambda _: self._hurry(limit))
                error = await relay(reply, downstream, scanner)
                if error is not None:
                    self._cause = f"upstream, in mid-stream: {error}"
                    await downstream.write(TRUNCATED if scanner.at_event_end else b"\n\n" + TRUNCATED)
                await downstream.finish()
        except TimeoutError:
            self._cause = f"the caller left, and upstream went on for more than {self._kit.leaver_drain_s} s"
        if not self.answer.done():
            self.answer.set_result(downstream.response)
        return Bought(maybe=True, bill=scanner.bill, generation_id=reply.generation_id)

    def _hurry(self, limit: asyncio.Timeout) -> None:
        """Once the caller has left, the rest of the stream is read for its bill, but not for ever."""
        if not self._caller_left():
            return
        with contextlib.suppress(RuntimeError):  # the stream has ended meanwhile
            limit.reschedule(asyncio.get_running_loop().time() + self._kit.leaver_drain_s)

    # -- after it

    async def _close(self, hold: Hold, bought: Bought) -> None:
        self._generation_id = bought.generation_id
        if not bought.maybe:
            await self._persist(self._kit.ledger.release_holds, [hold])
            self._outcome = "released" if self._cause is None else self._outcome
            return
        bill = bought.bill or await self._look_up(bought.generation_id)
        if bill is None:
            self._outcome = "unresolved"
            self._cause = self._cause or "no bill in the answer, and none at /generation"
            return  # the hold stays open: never silently free, never silently estimated
        self._bill = bill
        self._charge = self._kit.evaluate.charge(bill.cost_usd)
        self._generation_id = bought.generation_id or bill.generation_id
        settlement = Settlement(hold.account_id, hold.hold_id, self._charge, bill.cost_usd, self._generation_id)
        await self._persist(self._kit.ledger.settle_holds, [settlement])
        self._outcome = "settled"

    async def _look_up(self, generation_id: str | None) -> Bill | None:
        """Asks OpenRouter for the bill of a generation; it takes seconds, sometimes a minute, before it knows."""
        if generation_id is None:
            return None
        until = time.monotonic() + self._kit.lookup_s
        for pause in LOOKUP_PAUSES_S:
            if time.monotonic() + pause > until:
                break
            await asyncio.sleep(pause)
            try:
                if bill := await self._kit.upstream.generation(generation_id):
                    return bill
            except UpstreamError:
                continue
        return None

    async def _persist(self, write: Callable[[list[Any]], Awaitable[Any]], items: list[Any]) -> None:
        """Carries out a statement that is idempotent, however often it takes while the database is away."""
        for pause in itertools.chain(SETTLE_PAUSES_S, itertools.repeat(SETTLE_PAUSES_S[-1])):
            try:
                await write(items)
                return
            except DatabaseUnavailable as error:
                LOGGER.error("A hold cannot be closed yet: %s", error, extra={"requestId": self._request_id})
                await asyncio.sleep(pause)

    # -- what is said of it

    def _caller_left(self) -> bool:
        return self.answer.cancelled()

    def _refuse(self, refusal: Refusal) -> None:
        self._outcome = refusal.code
        self._cause = refusal.cause or refusal.code
        if not self.answer.done():
            self.answer.set_exception(refusal)

    def _log_request(self) -> None:
        self._kit.log.llm_request(
            model=self._ask.model,
            user_id=self._claim.account_id,
            request_id=self._request_id,
            stream=self._ask.stream,
            messages=self._ask.messages,
        )

    def _log_response(self) -> None:
        bill = self._bill
        self._kit.log.llm_response(
            model=self._ask.model,
            user_id=self._claim.account_id,
            request_id=self._request_id,
            stream=self._ask.stream,
            outcome=self._outcome,
            duration_ms=round((time.monotonic() - self._started) * 1000),
            generation_id=self._generation_id,
            prompt_tokens=bill.prompt_tokens if bill else None,
            completion_tokens=bill.completion_tokens if bill else None,
            cost_usd=bill.cost_usd if bill else None,
            cost_rub=None if self._charge is None else roubles(self._charge),
            cause=self._cause,
        )
