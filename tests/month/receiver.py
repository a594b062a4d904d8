"""The receiver of the service's alerts."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web


class Receiver:
    def __init__(self) -> None:
        self.url = ""
        self.told: list[str] = []
        """Of each message the kind and the name, such as `begin account_refused`, in the order in which they came."""

    async def receive(self, request: web.Request) -> web.Response:
        document = await request.json()
        self.told.append(f"{document['kind']} {document['condition']}")
        return web.json_response({"ok": True})


@asynccontextmanager
async def receiver() -> AsyncIterator[Receiver]:
    receiving, app = Receiver(), web.Application()
    app.router.add_post("/alerts", receiving.receive)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        receiving.url = f"http://127.0.0.1:{runner.addresses[0][1]}/alerts"
        yield receiving
    finally:
        await runner.cleanup()
