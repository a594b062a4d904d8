"""The simulator as an HTTP application: OpenRouter's API below `/api/v1`, the bills at `/simulator/bills`, and the account that
is used, which can be changed, at `/simulator/account`."""

import asyncio
import datetime
import functools
import itertools
import json
import time
from dataclasses import replace
from decimal import Decimal
from typing import Any

from aiohttp import web

from gptutor.simulator.account import MANAGEMENT_KEY, SimulatedAccount
from gptutor.simulator.billing_records import BillingRecord, BillingRecords
from gptutor.simulator.faults import FaultError, apply_generation_faults, apply_script_faults
from gptutor.simulator.generation import Generation, as_billed, dumps, generate, last_text
from gptutor.simulator.model_library import SimulatedModel, find_model, make_model_library
from gptutor.simulator.response_content import NoEndpoint
from gptutor.simulator.response_script import Script, error_response, plain_response, streamed_response
from gptutor.simulator.worst_case import dearest_provider, worst_input, worst_output

BODY_BYTES_MAX = 64 * 1024 * 1024
REFUSALS = frozenset({400, 401, 402, 403, 404, 408, 413, 422, 429, 503})


@functools.cache
def _models() -> tuple[dict[str, SimulatedModel], bytes]:
    """The library, and its list as JSON: the same for every simulator."""
    library = make_model_library()
    listings = [model.listing() for model in library.values()]
    return library, dumps({"data": listings, "total_count": len(listings), "links": {"next": None}})


class Simulator:
    """`first_word_s` and `word_s` are the time before the first word of a response and between its words.

    `generation_delay_s` is the time after the end of a response from which `GET /generation` returns it. `model_list` is the body
    of `GET /models`.
    """

    def __init__(self, *, word_s: float = 0.0, first_word_s: float = 0.0, generation_delay_s: float = 0.0) -> None:
        self.billing = BillingRecords()
        self.account = SimulatedAccount()
        self.word_s = word_s
        self.first_word_s = first_word_s
        self.generation_delay_s = generation_delay_s
        self.bills_worst_case = False
        """Whether every request is billed as much as the live service can bill for it."""
        self._library, self.model_list = _models()
        self._numbers = itertools.count(1)
        self._epoch = int(time.time())

    def app(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.add_routes(
            [
                web.post("/api/v1/chat/completions", self.complete),
                web.get("/api/v1/models", self.models),
                web.get("/api/v1/generation", self.generation),
                web.get("/api/v1/key", self.key),
                web.get("/api/v1/credits", self.credits),
                web.get("/api/v1/activity", self.activity),
                web.get("/simulator/account", self.show_account),
                web.post("/simulator/account", self.change_account),
                web.get("/simulator/bills", self.bills),
            ]
        )
        return app

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if not request.headers.get("Authorization", "").startswith("Bearer "):
            return self._refuse(error_response(401, "No auth credentials found"))
        if (refusal := self.account.rejects_key()) is not None:
            return self._refuse(refusal)
        try:
            document = json.loads(body)
            stream = bool(document.get("stream"))
            model_ids = [document.get("model") or document["models"][0], *(document.get("models") or [])]
            found = [find_model(self._library, model_id) for model_id in model_ids]
            if None in found:
                return self._refuse(error_response(400, f"{model_ids[found.index(None)]} is not a valid model ID"))
            models = [model for model in found if model is not None]
            if (refusal := self.account.refuses(models[0], document, self._used_usd)) is not None:
                return self._refuse(refusal)
            faults = f"{_fault_header(request)} {last_text(document['messages'])}"
            generation, script = self._respond(document, models, faults, stream=stream)
        except FaultError as error:
            return self._refuse(error_response(400, str(error)))
        except NoEndpoint as error:
            return self._refuse(error_response(404, str(error)))
        except (ValueError, KeyError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError):
            return self._refuse(error_response(400, "Invalid request"))
        if script.billed_deltas is None:
            return self._refuse(script)
        record = BillingRecord(generation.generation_id, generation.model.id, stream, body, dict(request.headers), time.time())
        self.billing.add(record)
        return await self._send(request, script, generation, record)

    def _refuse(self, script: Script) -> web.Response:
        """Refusals of OpenRouter's own have a generation id too, of which there is no record."""
        if script.status in REFUSALS and script.content_type == "application/json":
            script = replace(script, headers={"X-Generation-Id": self._new_generation_id(), **script.headers})
        return _send_at_once(script)

    def _new_generation_id(self) -> str:
        return f"gen-{self._epoch}-{next(self._numbers):08d}"

    def _respond(
        self, document: dict[str, Any], models: list[SimulatedModel], faults: str, *, stream: bool
    ) -> tuple[Generation, Script]:
        """The response of the first model, with the faults named in `faults`. Raises FaultError and what `generate` raises."""
        model, *others = models
        generation_id = self._new_generation_id()
        fallbacks = [other for other in others if other is not model]
        generation = apply_generation_faults(generate(generation_id, document, model, int(time.time()), fallbacks), faults)
        if self.bills_worst_case:
            dearest = dearest_provider(generation.model, document)
            worst = (dearest, worst_input(dearest, document), worst_output(dearest, document))
            generation = replace(generation, bills_worst_case=worst)
        if (tokens := generation.input.prompt_tokens) > generation.model.context:
            limit = generation.model.context
            return generation, error_response(
                400, f"This endpoint's maximum context length is {limit} tokens. You asked for {tokens}."
            )
        make_script = streamed_response if stream else plain_response
        script = make_script(generation, self.first_word_s, self.word_s)
        return generation, apply_script_faults(script, generation, faults)

    async def _send(
        self, request: web.Request, script: Script, generation: Generation, record: BillingRecord
    ) -> web.StreamResponse:
        """Sends the script and bills it: whole, or what was sent if the client disconnected and the model can be cancelled."""
        response = web.StreamResponse(status=script.status, headers={**script.headers, "Content-Type": script.content_type})
        billed_deltas = 0
        try:
            if not script.is_stream:
                await asyncio.sleep(script.steps[0].pause_s)  # a plain response is complete before its headers are sent
            await response.prepare(request)
            for number, step in enumerate(script.steps):
                if step.pause_s and (number or script.is_stream):
                    await asyncio.sleep(step.pause_s)
                if (transport := request.transport) is None:
                    raise ConnectionResetError
                if step.action in ("reset", "close"):
                    transport.abort() if step.action == "reset" else transport.close()
                    break
                billed_deltas = step.billed_deltas
                if step.action == "raw":
                    transport.write(step.data)
                else:
                    await response.write(step.data)
        except (asyncio.CancelledError, ConnectionError):
            record.cancelled = script.is_stream
            if script.is_stream and generation.model.cancellable:
                self._bill(record, generation, billed_deltas)
                raise
            self._bill(record, generation, script.billed_deltas or 0)
            raise
        self._bill(record, generation, script.billed_deltas or 0)
        return response

    def _bill(self, record: BillingRecord, generation: Generation, delta_count: int) -> None:
        usage = generation.usage(delta_count)
        record.prompt_tokens = usage["prompt_tokens"]
        record.completion_tokens = usage["completion_tokens"]
        record.is_byok = generation.is_byok
        if delta_count:  # without any output, OpenRouter does not charge for the prompt either
            record.fee_usd = as_billed(usage["cost"])
            if generation.is_byok:
                record.provider_usd = as_billed(usage["cost_details"]["upstream_inference_cost"])
        record.finished = True
        record.available_at = asyncio.get_running_loop().time() + self.generation_delay_s

    async def models(self, request: web.Request) -> web.Response:
        return web.Response(body=self.model_list, content_type="application/json")

    async def generation(self, request: web.Request) -> web.Response:
        record = self.billing.records.get(request.query.get("id", ""))
        if record is None or not record.finished or asyncio.get_running_loop().time() < record.available_at:
            return _send_at_once(error_response(404, "Generation not found"))
        return _json({"data": record.stats()})

    async def key(self, request: web.Request) -> web.Response:
        if (refusal := self.account.rejects_key()) is not None:
            return _send_at_once(refusal)
        return _json({"data": self.account.key(self._used_usd, self.billing.provider_usd())})

    async def credits(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {MANAGEMENT_KEY}":
            return _send_at_once(error_response(403, "Only management keys can fetch credits for an account"))
        return _json({"data": self.account.credits(self._used_usd)})

    async def show_account(self, request: web.Request) -> web.Response:
        return _json(self.account.shown())

    async def change_account(self, request: web.Request) -> web.Response:
        """Makes the account what the body says; what it does not name is as at the start."""
        try:
            self.account.change(json.loads(await request.read()))
        except (ValueError, ArithmeticError, AttributeError) as error:
            return _send_at_once(error_response(400, f"Not an account: {error}"))
        return await self.show_account(request)

    @property
    def _used_usd(self) -> Decimal:
        """What the account has paid to OpenRouter."""
        return self.billing.total_usd() - self.billing.provider_usd()

    async def activity(self, request: web.Request) -> web.Response:
        """The usage of past days: one day, without requests, because the simulator keeps no history."""
        yesterday = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=1)
        return _json({"data": [{"date": f"{yesterday} 00:00:00", "model": "openai/gpt-4o-mini", "usage": 0, "requests": 0}]})

    async def bills(self, request: web.Request) -> web.Response:
        """All bills, as the reference for GPTutor's ledger."""
        return _json(
            {
                "total_usd": str(self.billing.total_usd()),
                "bills": [
                    {
                        "id": record.generation_id,
                        "model": record.model,
                        "stream": record.stream,
                        "cancelled": record.cancelled,
                        "finished": record.finished,
                        "cost_usd": str(record.cost_usd),
                    }
                    for record in self.billing.records.values()
                ],
            }
        )


def _send_at_once(script: Script) -> web.Response:
    body = b"".join(step.data for step in script.steps)
    return web.Response(status=script.status, body=body, headers={**script.headers, "Content-Type": script.content_type})


def _json(value: Any) -> web.Response:
    return web.Response(body=dumps(value), content_type="application/json")


def _fault_header(request: web.Request) -> str:
    return " ".join(f"fault:{fault}" for fault in request.headers.get("X-Simulator-Fault", "").split())
