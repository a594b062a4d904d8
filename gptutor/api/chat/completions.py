"""`POST /v1/chat/completions`: the ask is read and checked here; `exchange.py` does the rest."""

import asyncio
import functools
import hashlib
import re

from aiohttp import web

from gptutor.api.auth import CLAIM
from gptutor.api.chat.context import RequestContext, Services
from gptutor.api.chat.exchange import begin
from gptutor.api.chat.request import ParsedRequest, parse_request
from gptutor.errors import ApiError
from gptutor.http.body import awaits_continue, read_body, require_json
from gptutor.http.middlewares import REQUEST_ID
from gptutor.money.keys import KeyClaim
from gptutor.openrouter.service import SENT_ON
from gptutor.telemetry.metrics import OFFLOADED_PARSES

SERVICES = web.AppKey("kit", Services)
ON_THE_LOOP_BYTES_MAX = 1024 * 1024
"""A larger body would hold up everybody else. It is checked on the slow lane: by a thread, one at a time."""
IDEMPOTENCY_KEY = re.compile(r"[ -~]{1,255}")


async def complete(request: web.Request) -> web.StreamResponse:
    require_json(request)
    kit, claim = request.app[SERVICES], request[CLAIM]
    is_proven = awaits_continue(request) or (request.content_length or 0) > ON_THE_LOOP_BYTES_MAX
    if is_proven:
        await _prove_key(kit, claim)
    body = await read_body(request, kit.body_limits)
    if len(body) > ON_THE_LOOP_BYTES_MAX and not is_proven:
        await _prove_key(kit, claim)
    key = request.headers.get("Idempotency-Key")
    try:
        ask = await _checked(kit, body)
        if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
            raise ApiError("invalid_request", "Idempotency-Key must be 1 to 255 printable ASCII characters")
    except ApiError:
        # A stranger must not learn from his mistakes that his key is one: for him there is only one answer (contract B3).
        await _prove_key(kit, claim)
        raise
    kit.readiness.require()
    body_hash = hashlib.sha256(body).digest() if key is not None else None
    headers = {name: request.headers[name] for name in SENT_ON if name in request.headers}
    return await begin(kit, request, RequestContext(request[REQUEST_ID], claim, ask, headers, key, body_hash))


async def _prove_key(kit: Services, claim: KeyClaim) -> None:
    """Where much is to be done before the hold, which proves the key otherwise. Raises ApiError."""
    if not await kit.keyring.is_alive(claim):
        raise ApiError("invalid_key") from None


async def _checked(kit: Services, body: bytes) -> ParsedRequest:
    """What is asked. Raises ApiError."""
    if len(body) <= ON_THE_LOOP_BYTES_MAX:
        ask = parse_request(body, default_model=kit.default_model)
    else:
        OFFLOADED_PARSES.inc()
        reading = functools.partial(parse_request, body, default_model=kit.default_model)
        ask = await asyncio.get_running_loop().run_in_executor(kit.slow_lane, reading)
    for model in (ask.model, *ask.fallbacks):
        if kit.catalogue.lacks(model):
            raise ApiError("model_not_found", f"{model} is not a model of OpenRouter's; GET /v1/models lists them")
    return ask
