"""What an exchange works with: the context of one request, and the services that all requests share."""

import functools
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from gptutor.api.chat.event_stream import StreamLimits
from gptutor.api.chat.large_bodies import LargeBodies
from gptutor.api.chat.request import ParsedRequest
from gptutor.api.verified_keys import VerifiedKeys
from gptutor.http.address_limits import RequestCounter
from gptutor.http.body import BodyLimits
from gptutor.http.byte_budget import ByteBudget, ByteShare
from gptutor.http.rate_limit import RateLimit
from gptutor.money.amounts import AccountId, Nano
from gptutor.money.keys import KeyClaim
from gptutor.money.ledger import Ledger
from gptutor.money.pricing import LLMCostEvaluate
from gptutor.openrouter.catalogue import Catalogue
from gptutor.openrouter.service import OpenRouterService
from gptutor.tasks import BackgroundTasks
from gptutor.telemetry.logs import LoggerService

if TYPE_CHECKING:
    from gptutor.api.chat.exchange import Exchange


class RequestContext(msgspec.Struct, frozen=True):
    """One request, and the key that it claims. `body_hash` is the SHA-256 of its body."""

    request_id: str
    claim: KeyClaim
    parsed: ParsedRequest
    forwarded_headers: Mapping[str, str]
    """The client's headers that are forwarded to OpenRouter, by `openrouter.headers.FORWARDED_HEADERS`."""
    body_share: ByteShare
    """The bytes of the body, until it was sent."""
    counted_as: str | bytes
    """As what `Services.refusals` has counted the request, until its hold is placed; and as how many requests."""
    weight: int
    body_hash: bytes
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class Services:
    """Created once, when the application starts."""

    ledger: Ledger
    evaluate: LLMCostEvaluate
    upstream: OpenRouterService
    catalogue: Catalogue
    log: LoggerService
    in_flight: BackgroundTasks
    """One task for each exchange whose hold is not closed yet."""
    large_bodies: LargeBodies
    body_limits: BodyLimits
    body_budget: ByteBudget
    """Request bodies that are in memory: while they are read, and until they were sent."""
    answer_budget: ByteBudget
    """Plain responses that are in memory: while they are read, and until the client has taken them."""
    answer_bytes_max: int
    balance_min: Nano
    """With less available, no large body is read."""
    verified_keys: VerifiedKeys
    refusals: RequestCounter
    """Requests, by `VerifiedKeys.counted_as`, whose hold is not placed."""
    free_models: RequestCounter
    """Requests of an account for free models, whose quota OpenRouter counts for all accounts together."""
    default_model: str
    pseudonym_key: bytes
    stream_limits: StreamLimits
    rate_limit: RateLimit
    exchanges: set["Exchange"] = field(default_factory=set)
    """Those that have not ended."""

    def pseudonym(self, account_id: AccountId) -> str:
        """The stable id of the account upstream, which does not reveal the account."""
        return _pseudonym(self.pseudonym_key, account_id)


@functools.lru_cache(maxsize=10_000)
def _pseudonym(key: bytes, account_id: AccountId) -> str:
    return hmac.new(key, b"user %d" % account_id, hashlib.sha256).hexdigest()[:32]
