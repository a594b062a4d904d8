"""Sending alerts: a POST of JSON to an address of the operator's, or a message by Telegram's bot API.

The address and the token are secrets: neither is in an exception or a log line.
"""

import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson

from gptutor.config.schema import AlertSettings
from gptutor.telemetry.alerts import Alert, Undelivered, in_words

TELEGRAM_URL = "https://api.telegram.org"
RESPONSE_BYTES_MAX = 4096
TEXT_CHARACTERS_MAX = 4000
"""Telegram takes 4096."""
DESCRIPTION_CHARACTERS_MAX = 200


class Webhook:
    def __init__(self, session: aiohttp.ClientSession, settings: AlertSettings) -> None:
        self._session = session
        self._form = settings.form
        self._token = settings.token
        self._chat_id = settings.chat_id
        self._proxy = settings.proxy or None
        self._host = socket.gethostname()
        self._url = settings.url
        if settings.form == "telegram":
            self._url = f"{(settings.url or TELEGRAM_URL).rstrip('/')}/bot{settings.token}/sendMessage"

    async def send(self, alert: Alert) -> None:
        """One attempt. Raises Undelivered."""
        headers = {"Content-Type": "application/json"}
        if self._form == "json" and self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            async with self._session.post(
                self._url, data=orjson.dumps(self._document(alert)), headers=headers, proxy=self._proxy, allow_redirects=False
            ) as response:
                body = await response.content.read(RESPONSE_BYTES_MAX)
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            # No cause: the texts of these exceptions may have the address, which has the token.
            raise Undelivered(f"the receiver does not answer ({type(error).__name__})") from None
        if not 200 <= status < 300:
            answer = _read_answer(body)
            description = str(answer.get("description", ""))[:DESCRIPTION_CHARACTERS_MAX]
            if self._token:
                description = description.replace(self._token, "…")
            raise Undelivered(
                f"status {status} {description}".strip(),
                retry_after_s=_retry_after_s(answer),
                is_final=300 <= status < 500 and status not in (408, 429),
            )

    def _document(self, alert: Alert) -> dict[str, Any]:
        text = in_words(alert, self._host)[:TEXT_CHARACTERS_MAX]
        if self._form == "telegram":
            return {"chat_id": self._chat_id, "text": text, "disable_web_page_preview": True}
        return {
            "text": text,
            "kind": alert.kind,
            "condition": alert.name,
            "description": alert.text,
            "count": alert.count,
            "since": alert.since,
            "host": self._host,
        }


def _read_answer(body: bytes) -> Mapping[str, Any]:
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _retry_after_s(answer: Mapping[str, Any]) -> float | None:
    """Telegram's wish in seconds, at most a minute."""
    parameters = answer.get("parameters")
    wish = parameters.get("retry_after") if isinstance(parameters, dict) else None
    return min(float(wish), 60.0) if isinstance(wish, int) and wish > 0 else None


@asynccontextmanager
async def connected(settings: AlertSettings) -> AsyncIterator[Webhook | None]:
    """A webhook with a session of its own; None: nobody is to be told. Without `proxy` HTTPS_PROXY counts, as everywhere."""
    if not settings.url and settings.form == "json":
        yield None
        return
    timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=not settings.proxy) as session:
        yield Webhook(session, settings)
