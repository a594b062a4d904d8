"""`POST /v1/chat/completions`: the ask is read and checked here; `exchange.py` does the rest."""

import asyncio
import functools
import hashlib
import re

from aiohttp import web

from gptutor.api.ask import Ask, read_ask
from gptutor.api.body import read_body, require_json, waits_to_be_invited
from gptutor.api.exchange import begin
from gptutor.api.identity import CLAIM
from gptutor.api.middlewares import REQUEST_ID
from gptutor.api.order import Kit, Order
from gptutor.errors import Refusal
from gptutor.metrics import SLOW_PARSES
from gptutor.money.keys import KeyClaim
from gptutor.openrouter.service import SENT_ON

KIT = web.AppKey("kit", Kit)
ON_THE_LOOP_BYTES_MAX = 1024 * 1024
"""A larger body would hold up everybody else. It is checked on the slow lane: by a thread, one at a time."""
IDEMPOTENCY_KEY = re.compile(r"[ -~]{1,255}")


async def complete(request: web.Request) -> web.StreamResponse:
    require_json(request)
    kit, claim = request.app[KIT], request[CLAIM]
    is_proven = waits_to_be_invited(request) or (request.content_length or 0) > ON_THE_LOOP_BYTES_MAX
    if is_proven:
        await _prove_key(kit, claim)
    body = await read_body(request, kit.body_limits)
    if len(body) > ON_THE_LOOP_BYTES_MAX and not is_proven:
        await _prove_key(kit, claim)
    key = request.headers.get("Idempotency-Key")
    try:
        ask = await _checked(kit, body)
        if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
            raise Refusal("invalid_request", "Idempotency-Key must be 1 to 255 printable ASCII characters")
    except Refusal:
        # A stranger must not learn from his mistakes that his key is one: for him there is only one answer (contract B3).
        await _prove_key(kit, claim)
        raise
    kit.readiness.require()
    body_hash = hashlib.sha256(body).digest() if key is not None else None
    headers = {name: request.headers[name] for name in SENT_ON if name in request.headers}
    return await begin(kit, request, Order(request[REQUEST_ID], claim, ask, headers, key, body_hash))


async def _prove_key(kit: Kit, claim: KeyClaim) -> None:
    """Where much is to be done before the hold, which proves the key otherwise. Raises Refusal."""
    if not await kit.keyring.is_alive(claim):
        raise Refusal("invalid_key") from None


async def _checked(kit: Kit, body: bytes) -> Ask:
    """What is asked. Raises Refusal."""
    if len(body) <= ON_THE_LOOP_BYTES_MAX:
        ask = read_ask(body, default_model=kit.default_model)
    else:
        SLOW_PARSES.inc()
        reading = functools.partial(read_ask, body, default_model=kit.default_model)
        ask = await asyncio.get_running_loop().run_in_executor(kit.slow_lane, reading)
    for model in (ask.model, *ask.fallbacks):
        if kit.catalogue.lacks(model):
            raise Refusal("model_not_found", f"{model} is not a model of OpenRouter's; GET /v1/models lists them")
    return ask
