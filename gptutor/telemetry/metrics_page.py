"""`GET /metrics`: one page, on `metrics.port` and on the administrators' listener."""

import asyncio
import platform
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from gptutor import __version__
from gptutor.telemetry.event_loop import LoopLag
from gptutor.telemetry.metrics import BUILD_INFO
from gptutor.telemetry.revision import revision
from gptutor.telemetry.shared_metrics import FOLDER, MetricsBusy, MetricsText, own_text, shared_metrics
from gptutor.telemetry.snapshots import CONTENT_TYPE

BUILD_INFO.labels(__version__, platform.python_version(), revision()).set(1)


@asynccontextmanager
async def process_metrics(data: Path, *, is_served: bool) -> AsyncIterator[MetricsText]:
    """For the life of a process, and longer than anything that counts. With `is_served`, it is one of those below `data` that
    answer for each other."""
    with LoopLag().measured():
        if not is_served:
            yield own_text
            return
        sharing = shared_metrics(data / FOLDER)
        text = sharing.__enter__()
        try:
            yield text
        finally:
            await asyncio.to_thread(sharing.__exit__, None, None, None)


def metrics_handler(text: MetricsText) -> Handler:
    async def show_metrics(request: web.Request) -> web.StreamResponse:
        """In a thread: the event loop goes on meanwhile."""
        try:
            body = await asyncio.to_thread(text)
        except MetricsBusy as error:
            return web.Response(status=503, text=f"{error}\n")
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    return show_metrics


def build_metrics(text: MetricsText = own_text) -> web.Application:
    """The application of `metrics.port`."""
    app = web.Application()
    app.router.add_get("/metrics", metrics_handler(text))
    return app
