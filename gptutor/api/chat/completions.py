"""`POST /v1/chat/completions`: the handler reads and checks the request; `exchange.py` does the rest."""

import asyncio
import functools
import hashlib
import re

from aiohttp import web

from gptutor.api.chat.context import RequestContext, Services
from gptutor.api.chat.exchange import start_exchange
from gptutor.api.chat.request import ParsedRequest, parse_request
from gptutor.errors import ApiError
from gptutor.http.app_keys import CLAIM, KEYRING, READINESS, REQUEST_ID, SERVICES
from gptutor.http.body import awaits_continue, read_body, require_json
from gptutor.money.keys import KeyClaim
from gptutor.openrouter.service import FORWARDED_HEADERS
from gptutor.telemetry.metrics import OFFLOADED_PARSES

INLINE_PARSE_BYTES_MAX = 1024 * 1024
"""Parsing a larger body would block the event loop: a thread parses such bodies, one at a time."""
IDEMPOTENCY_KEY = re.compile(r"[ -~]{1,255}")


async def complete(request: web.Request) -> web.StreamResponse:
    require_json(request)
    services, claim = request.app[SERVICES], request[CLAIM]
    is_verified = awaits_continue(request) or (request.content_length or 0) > INLINE_PARSE_BYTES_MAX
    if is_verified:
        await _verify_key(request, claim)
    body = await read_body(request, services.body_limits)
    if len(body) > INLINE_PARSE_BYTES_MAX and not is_verified:
        await _verify_key(request, claim)
    key = request.headers.get("Idempotency-Key")
    try:
        parsed = await _parse(services, body)
        if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
            raise ApiError("invalid_request", "Idempotency-Key must be 1 to 255 printable ASCII characters")
    except ApiError:
        # An error in the body must not tell an unauthenticated client that a key is valid: such a client gets 401 (contract B3).
        await _verify_key(request, claim)
        raise
    request.app[READINESS].require()
    body_hash = hashlib.sha256(body).digest() if key is not None else None
    headers = {name: request.headers[name] for name in FORWARDED_HEADERS if name in request.headers}
    context = RequestContext(request[REQUEST_ID], claim, parsed, headers, key, body_hash)
    return await start_exchange(services, request, context)


async def _verify_key(request: web.Request, claim: KeyClaim) -> None:
    """Verifies the key where much work precedes the hold, which verifies the key otherwise. Raises ApiError."""
    if not await request.app[KEYRING].is_alive(claim):
        raise ApiError("invalid_key") from None


async def _parse(services: Services, body: bytes) -> ParsedRequest:
    """Raises ApiError for an invalid body, and for a model that OpenRouter does not have."""
    if len(body) <= INLINE_PARSE_BYTES_MAX:
        parsed = parse_request(body, default_model=services.default_model)
    else:
        OFFLOADED_PARSES.inc()
        parse = functools.partial(parse_request, body, default_model=services.default_model)
        parsed = await asyncio.get_running_loop().run_in_executor(services.parser_thread, parse)
    for model in (parsed.model, *parsed.fallbacks):
        if services.catalogue.is_unknown(model):
            raise ApiError("model_not_found", f"{model} is not a model of OpenRouter's; GET /v1/models lists them")
    return parsed
