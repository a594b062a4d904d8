"""`POST /v1/chat/completions`: the handler reads and checks the request; `exchange.py` does the rest.

Before the hold, which verifies the key, little may be spent on a request: a body of more than LARGE_BODY_BYTES_MIN is read and
parsed only for a verified key, in a thread, and while its account has a place for it.
"""

import functools
import hashlib
import re
import time
from contextlib import ExitStack

from aiohttp import web

from gptutor.api.chat.context import RequestContext, Services
from gptutor.api.chat.errors import error_for_refusal
from gptutor.api.chat.exchange import start_exchange
from gptutor.api.chat.large_bodies import COMMAS_MAX, LARGE_BODY_BYTES_MIN, LARGE_BODY_WEIGHT
from gptutor.api.chat.request import ParsedRequest, parse_request
from gptutor.api.verified_keys import UNKNOWN, hide_duration
from gptutor.errors import ApiError
from gptutor.http.app_keys import CLAIM, KEY_VERIFIED, KEYRING, READINESS, REQUEST_ID, SERVICES
from gptutor.http.body import awaits_continue, read_body, require_json
from gptutor.http.byte_budget import BudgetExceeded, ByteShare
from gptutor.money.keys import KeyClaim
from gptutor.openrouter.errors import AccountRefused
from gptutor.openrouter.headers import FORWARDED_HEADERS
from gptutor.telemetry.metrics import OFFLOADED_PARSES

FREE = ":free"
IDEMPOTENCY_KEY = re.compile(r"[ -~]{1,255}")


async def complete(request: web.Request) -> web.StreamResponse:
    require_json(request)
    services, claim = request.app[SERVICES], request[CLAIM]
    try:
        services.upstream.account.require()
    except AccountRefused as error:  # nothing was read of the body, and nothing is asked of the database
        raise error_for_refusal(error) from None
    admission = Admission(request, services, claim)
    await services.refusals.require_room(admission.counted_as)
    try:
        if awaits_continue(request):
            await admission.verify_key()
        if (request.content_length or 0) > LARGE_BODY_BYTES_MIN:
            await admission.admit_large_body()
        body = await read_body(request, services.body_limits, admission)
        if body.count(b",") > COMMAS_MAX:
            await admission.admit_large_body()
        key = request.headers.get("Idempotency-Key")
        try:
            parsed, body_hash = await _parse(services, admission, body)
            if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
                raise ApiError("invalid_request", "Idempotency-Key must be 1 to 255 printable ASCII characters")
        except ApiError:
            # An error in the body must not tell an unauthenticated client that a key is valid: it gets 401 (contract B3).
            await admission.verify_key()
            raise
        if any(model.endswith(FREE) for model in (parsed.model, *parsed.fallbacks)):
            await services.free_models.require_room(admission.counted_as)
        del body  # what is needed of it is in `parsed`, until it is sent
    except BaseException:
        admission.share.release()
        raise
    finally:
        if admission.place is not None:
            admission.place.close()
    request.app[READINESS].require()
    headers = {name: request.headers[name] for name in FORWARDED_HEADERS if name in request.headers}
    context = RequestContext(
        request_id=request[REQUEST_ID],
        claim=claim,
        parsed=parsed,
        forwarded_headers=headers,
        body_share=admission.share,
        counted_as=admission.counted_as,
        weight=admission.weight,
        body_hash=body_hash,
        idempotency_key=key,
    )
    return await start_exchange(services, request, context)


class Admission:
    """Admits a request's body: its bytes are counted, and a large body needs a verified key, some money and a place."""

    def __init__(self, request: web.Request, services: Services, claim: KeyClaim) -> None:
        self.share = ByteShare(services.body_budget)
        self.place: ExitStack | None = None
        """What a large body has until it is parsed."""
        self.claim = claim
        self.counted_as = services.verified_keys.counted_as(claim)
        self.weight = 1
        """As how many requests this one is counted, while its hold is not placed."""
        self._request = request
        self._services = services
        self._size = 0
        self._is_verified = False

    async def receive(self, size: int) -> None:
        """Counts bytes of the body. Raises ApiError."""
        self._size += size
        if self._size > LARGE_BODY_BYTES_MIN:
            await self.admit_large_body()
        try:
            self.share.grow(size)
        except BudgetExceeded as error:
            raise _error_for_budget(error) from None

    async def admit_large_body(self) -> None:
        """Raises ApiError."""
        if self.place is not None:
            return
        await self._services.refusals.require_room(self.counted_as, LARGE_BODY_WEIGHT - 1)
        self.weight = LARGE_BODY_WEIGHT
        await self.verify_key(needs_money=True)
        self.place = ExitStack()
        self.place.enter_context(self._services.large_bodies.place(self.claim.account_id))
        try:
            self.share.charge_to(self.claim.account_id)
        except BudgetExceeded as error:
            raise _error_for_budget(error) from None

    async def verify_key(self, *, needs_money: bool = False) -> None:
        """Verifies the key where much work precedes the hold, which verifies the key otherwise. Raises ApiError."""
        if self._is_verified and not needs_money:
            return
        known = self._services.verified_keys
        if not known.is_fresh(self.claim):
            started = time.monotonic()
            key = await self._request.app[KEYRING].opened_by(self.claim)
            if key is None:
                known.discard(self.claim)
                await hide_duration(started)
                raise ApiError("invalid_key", cause=UNKNOWN) from None
            has_money = key.available >= self._services.balance_min
            known.add(self.claim, is_fresh=has_money)
            self._is_verified = self._request[KEY_VERIFIED] = True
            if needs_money and not has_money:
                raise ApiError("insufficient_balance")
        self._is_verified = self._request[KEY_VERIFIED] = True


async def _parse(services: Services, admission: Admission, body: bytes) -> tuple[ParsedRequest, bytes]:
    """The request, and the SHA-256 of its body. Raises ApiError for an invalid body, and for a model that OpenRouter lacks."""
    work = functools.partial(_parse_and_hash, body, services.default_model)
    if admission.place is None:
        parsed, body_hash = work()
    else:
        OFFLOADED_PARSES.inc()
        parsed, body_hash = await services.large_bodies.run(admission.claim.account_id, work)
    for model in (parsed.model, *parsed.fallbacks):
        if services.catalogue.is_unknown(model):
            raise ApiError("model_not_found", f"{model} is not a model of OpenRouter's; GET /v1/models lists them")
    return parsed, body_hash


def _parse_and_hash(body: bytes, default_model: str) -> tuple[ParsedRequest, bytes]:
    """Raises ApiError."""
    return parse_request(body, default_model=default_model), hashlib.sha256(body).digest()


def _error_for_budget(error: BudgetExceeded) -> ApiError:
    if error.by_account:
        return ApiError("too_many_concurrent_requests", "Too many large requests at the same time")
    return ApiError("overloaded")
