"""The bare relay that GPTutor is measured against: aiohttp on both sides, the ordinary way, without any of GPTutor's work.

No authentication, no money, no log. It passes the body on, and the answer back as it comes.
"""

import sys

import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

PATH = "/v1/chat/completions"


def build(upstream: str) -> web.Application:
    app = web.Application(client_max_size=10 << 20)
    session = web.AppKey("session", ClientSession)

    async def connected(app: web.Application):
        async with ClientSession(
            connector=TCPConnector(limit=0, ssl=ssl_context()), timeout=ClientTimeout(total=None), auto_decompress=False
        ) as opened:
            app[session] = opened
            yield

    async def relay(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        async with request.app[session].post(upstream, data=body, headers={"Content-Type": "application/json"}) as reply:
            if reply.content_type != "text/event-stream":
                return web.Response(body=await reply.read(), status=reply.status, content_type=reply.content_type)
            response = web.StreamResponse(status=reply.status, headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            async for chunk in reply.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    app.cleanup_ctx.append(connected)
    app.router.add_post(PATH, relay)
    return app


def ssl_context():
    """Reads SSL_CERT_FILE now: aiohttp's own context was made when it was imported."""
    import ssl

    return ssl.create_default_context()


if __name__ == "__main__":
    web.run_app(
        build(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None, loop=uvloop.new_event_loop()
    )
