"""How a refusal is told: `{"error": "<text>"}`, its code in a header (contract B1)."""

from aiohttp import web

from gptutor.errors import ApiError
from gptutor.telemetry.metrics import ERROR_RESPONSES


def error_response(refusal: ApiError) -> web.Response:
    ERROR_RESPONSES.labels(refusal.code).inc()
    return web.json_response(
        {"error": refusal.text, **refusal.more}, status=refusal.status, headers={**refusal.headers, "X-Error-Code": refusal.code}
    )
