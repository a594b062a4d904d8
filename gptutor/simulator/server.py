"""The simulator over HTTP: OpenRouter's paths below `/api/v1`, and its books below `/simulator`."""

import asyncio
import datetime
import itertools
import json
import time
from decimal import Decimal
from typing import Any

from aiohttp import web

from gptutor.simulator.books import BillingRecords, Record
from gptutor.simulator.faults import FaultError, apply_faults, change_generation
from gptutor.simulator.generation import Generation, as_billed, dumps, generate, last_text
from gptutor.simulator.library import SimulatedModel, find, make_library
from gptutor.simulator.script import Script, plain, refused, streamed
from gptutor.simulator.speech import NoEndpoint

BODY_BYTES_MAX = 64 * 1024 * 1024


class Simulator:
    """`word_s` and `first_word_s` are the pace of an answer; `known_after_s` is how late `/generation` learns of it."""

    def __init__(self, *, word_s: float = 0.0, first_word_s: float = 0.0, known_after_s: float = 0.0) -> None:
        self.books = BillingRecords()
        self.word_s = word_s
        self.first_word_s = first_word_s
        self.known_after_s = known_after_s
        self._library = make_library()
        self._models = dumps({"data": [model.listing() for model in self._library.values()]})
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
                web.get("/api/v1/activity", self.activity),
                web.get("/simulator/bills", self.bills),
            ]
        )
        return app

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if not request.headers.get("Authorization", "").startswith("Bearer "):
            return _answer(refused(401, "No auth credentials found"))
        try:
            ask = json.loads(body)
            stream = bool(ask.get("stream"))
            names = [ask.get("model") or ask["models"][0], *(ask.get("models") or [])]
            models = [find(self._library, name) for name in names]
            if None in models:
                return _answer(refused(400, f"{names[models.index(None)]} is not a valid model ID"))
            asked = f"{_fault_header(request)} {last_text(ask['messages'])}"
            generation, script = self._perform(ask, [model for model in models if model is not None], asked, stream=stream)
        except FaultError as error:
            return _answer(refused(400, str(error)))
        except NoEndpoint as error:
            return _answer(refused(404, str(error)))
        except (ValueError, KeyError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError):
            return _answer(refused(400, "Invalid request"))
        if script.billed_words is None:
            return _answer(script)
        record = Record(generation.generation_id, generation.model.id, stream, body, dict(request.headers), time.time())
        self.books.open(record)
        return await self._play(request, script, generation, record)

    def _perform(
        self, ask: dict[str, Any], models: list[SimulatedModel], asked: str, *, stream: bool
    ) -> tuple[Generation, Script]:
        """What the first of the models says to the ask, under the faults asked for."""
        model, *others = models
        name = f"gen-{self._epoch}-{next(self._numbers):08d}"
        fallbacks = [other for other in others if other is not model]
        generation = change_generation(generate(name, ask, model, int(time.time()), fallbacks), asked)
        if (tokens := generation.given.prompt_tokens) > generation.model.context:
            limit = generation.model.context
            return generation, refused(400, f"This endpoint's maximum context length is {limit} tokens. You asked for {tokens}.")
        script = (streamed if stream else plain)(generation, self.first_word_s, self.word_s)
        return generation, apply_faults(script, generation, asked)

    async def _play(self, request: web.Request, script: Script, generation: Generation, record: Record) -> web.StreamResponse:
        """Sends the script. What is billed: all of it at the end or at a break, what was said if a caller left in time."""
        response = web.StreamResponse(status=script.status, headers={**script.headers, "Content-Type": script.content_type})
        said = 0
        try:
            if not script.is_stream:
                await asyncio.sleep(script.steps[0].pause_s)  # a plain answer is made before its headers are sent
            await response.prepare(request)
            for number, step in enumerate(script.steps):
                if step.pause_s and (number or script.is_stream):
                    await asyncio.sleep(step.pause_s)
                if (transport := request.transport) is None:
                    raise ConnectionResetError
                if step.act in ("reset", "close"):
                    transport.abort() if step.act == "reset" else transport.close()
                    break
                said = step.words
                if step.act == "raw":
                    transport.write(step.data)
                else:
                    await response.write(step.data)
        except (asyncio.CancelledError, ConnectionError):
            record.cancelled = script.is_stream
            if script.is_stream and generation.model.cancellable:
                self._bill(record, generation, said)
                raise
            self._bill(record, generation, script.billed_words or 0)
            raise
        self._bill(record, generation, script.billed_words or 0)
        return response

    def _bill(self, record: Record, generation: Generation, words: int) -> None:
        usage = generation.usage(words)
        record.prompt_tokens = usage["prompt_tokens"]
        record.completion_tokens = usage["completion_tokens"]
        record.is_byok = generation.byok
        if words:  # if nothing was said, OpenRouter does not charge for the prompt either
            record.fee_usd = as_billed(usage["cost"])
            record.provider_usd = as_billed(usage["cost_details"]["upstream_inference_cost"] or Decimal(0))
        record.finished = True
        record.known_at = asyncio.get_running_loop().time() + self.known_after_s

    async def models(self, request: web.Request) -> web.Response:
        return web.Response(body=self._models, content_type="application/json")

    async def generation(self, request: web.Request) -> web.Response:
        record = self.books.records.get(request.query.get("id", ""))
        if record is None or not record.finished or asyncio.get_running_loop().time() < record.known_at:
            return _answer(refused(404, "Generation not found"))
        return _json({"data": record.stats()})

    async def key(self, request: web.Request) -> web.Response:
        usage = self.books.total_usd() - self.books.provider_usd()
        return _json(
            {
                "data": {
                    "label": "sk-or-simulator",
                    "limit": None,
                    "limit_remaining": None,
                    "usage": usage,
                    "usage_daily": usage,
                    "usage_weekly": usage,
                    "usage_monthly": usage,
                    "byok_usage": self.books.provider_usd(),
                    "is_free_tier": False,
                    "is_management_key": False,
                }
            }
        )

    async def activity(self, request: web.Request) -> web.Response:
        """Past days, which a simulator has not lived through: one, on which nothing was asked."""
        yesterday = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=1)
        return _json({"data": [{"date": f"{yesterday} 00:00:00", "model": "openai/gpt-4o-mini", "usage": 0, "requests": 0}]})

    async def bills(self, request: web.Request) -> web.Response:
        """Everything served, as the simulator would bill it: the oracle of our own books."""
        return _json(
            {
                "total_usd": str(self.books.total_usd()),
                "bills": [
                    {
                        "id": record.generation_id,
                        "model": record.model,
                        "stream": record.stream,
                        "cancelled": record.cancelled,
                        "finished": record.finished,
                        "cost_usd": str(record.cost_usd),
                    }
                    for record in self.books.records.values()
                ],
            }
        )


def _answer(script: Script) -> web.Response:
    body = b"".join(step.data for step in script.steps)
    return web.Response(status=script.status, body=body, headers={**script.headers, "Content-Type": script.content_type})


def _json(value: Any) -> web.Response:
    return web.Response(body=dumps(value), content_type="application/json")


def _fault_header(request: web.Request) -> str:
    return " ".join(f"fault:{fault}" for fault in request.headers.get("X-Simulator-Fault", "").split())
