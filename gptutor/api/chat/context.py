"""What an exchange is given: the order of one caller, and the kit that all exchanges use."""

import functools
import hashlib
import hmac
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from gptutor.api.chat.event_stream import StreamLimits
from gptutor.api.chat.in_flight import InFlight
from gptutor.api.chat.request import ParsedRequest
from gptutor.http.body import BodyLimits
from gptutor.http.rate_limit import RateLimit
from gptutor.money.amounts import AccountId
from gptutor.money.keys import KeyClaim
from gptutor.money.ledger import Ledger
from gptutor.money.pricing import LLMCostEvaluate
from gptutor.openrouter.catalogue import Catalogue
from gptutor.openrouter.service import OpenRouterService
from gptutor.telemetry.logs import LoggerService


class RequestContext(msgspec.Struct, frozen=True):
    """What a caller wants, and who he says he is. With an idempotency key comes the SHA-256 of the body."""

    request_id: str
    claim: KeyClaim
    ask: ParsedRequest
    headers: Mapping[str, str]
    """Those of his headers that are sent on, by `openrouter.service.SENT_ON`."""
    idempotency_key: str | None = None
    body_hash: bytes | None = None


@dataclass(frozen=True, slots=True)
class Services:
    """Made once, at the start of the application."""

    ledger: Ledger
    evaluate: LLMCostEvaluate
    upstream: OpenRouterService
    catalogue: Catalogue
    log: LoggerService
    in_flight: InFlight
    slow_lane: ThreadPoolExecutor
    """Where large bodies are read, one at a time."""
    body_limits: BodyLimits
    default_model: str
    pseudonym_key: bytes
    patience: StreamLimits
    pace: RateLimit

    def pseudonym(self, account_id: AccountId) -> str:
        """The account's stable name upstream, from which nobody learns the account."""
        return _pseudonym(self.pseudonym_key, account_id)


@functools.lru_cache(maxsize=10_000)
def _pseudonym(key: bytes, account_id: AccountId) -> str:
    return hmac.new(key, b"user %d" % account_id, hashlib.sha256).hexdigest()[:32]
