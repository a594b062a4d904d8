"""What an exchange is given: the order of one caller, and the kit that all exchanges use."""

import functools
import hashlib
import hmac
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from gptutor.api.ask import Ask
from gptutor.api.body import BodyLimits
from gptutor.api.event_stream import Patience
from gptutor.api.health import Readiness
from gptutor.api.inflight import InFlight
from gptutor.api.pace import Pace
from gptutor.logs import LoggerService
from gptutor.money.amounts import AccountId
from gptutor.money.keyring import KeyRing
from gptutor.money.keys import KeyClaim
from gptutor.money.ledger import Ledger
from gptutor.money.pricing import LLMCostEvaluate
from gptutor.openrouter.catalogue import Catalogue
from gptutor.openrouter.service import OpenRouterService


class Order(msgspec.Struct, frozen=True):
    """What a caller wants, and who he says he is. With an idempotency key comes the SHA-256 of the body."""

    request_id: str
    claim: KeyClaim
    ask: Ask
    headers: Mapping[str, str]
    """Those of his headers that are sent on, by `openrouter.service.SENT_ON`."""
    idempotency_key: str | None = None
    body_hash: bytes | None = None


@dataclass(frozen=True, slots=True)
class Kit:
    """Made once, at the start of the application."""

    ledger: Ledger
    evaluate: LLMCostEvaluate
    upstream: OpenRouterService
    catalogue: Catalogue
    log: LoggerService
    in_flight: InFlight
    readiness: Readiness
    keyring: KeyRing
    slow_lane: ThreadPoolExecutor
    """Where large bodies are read, one at a time."""
    body_limits: BodyLimits
    default_model: str
    pseudonym_key: bytes
    patience: Patience
    pace: Pace

    def pseudonym(self, account_id: AccountId) -> str:
        """The account's stable name upstream, from which nobody learns the account."""
        return _pseudonym(self.pseudonym_key, account_id)


@functools.lru_cache(maxsize=10_000)
def _pseudonym(key: bytes, account_id: AccountId) -> str:
    return hmac.new(key, b"user %d" % account_id, hashlib.sha256).hexdigest()[:32]
