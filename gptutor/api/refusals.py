"""How a refusal is told: `{"error": "<text>"}`, its code in a header (contract B1)."""

from aiohttp import web

from gptutor.errors import Refusal
from gptutor.metrics import REFUSALS


def as_response(refusal: Refusal) -> web.Response:
    REFUSALS.labels(refusal.code).inc()
    return web.json_response(
        {"error": refusal.text, **refusal.more}, status=refusal.status, headers={**refusal.headers, "X-Error-Code": refusal.code}
    )
