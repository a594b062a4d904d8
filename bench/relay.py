"""The bare relay that GPTutor is compared with: an ordinary aiohttp server and client, without any of GPTutor's work.

It forwards the request body and the response, without authentication, billing or logging.
"""

import ssl
import sys
from collections.abc import AsyncIterator

import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

PATH = "/v1/chat/completions"


def build(upstream: str) -> web.Application:
    app = web.Application(client_max_size=10 << 20)
    session = web.AppKey("session", ClientSession)

    async def open_session(app: web.Application) -> AsyncIterator[None]:
        async with ClientSession(
            connector=TCPConnector(limit=0, ssl=ssl_context()), timeout=ClientTimeout(total=None), auto_decompress=False
        ) as opened:
            app[session] = opened
            yield

    async def relay(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        async with request.app[session].post(
            upstream, data=body, headers={"Content-Type": "application/json"}
        ) as upstream_response:
            if upstream_response.content_type != "text/event-stream":
                return web.Response(
                    body=await upstream_response.read(),
                    status=upstream_response.status,
                    content_type=upstream_response.content_type,
                )
            response = web.StreamResponse(status=upstream_response.status, headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            async for chunk in upstream_response.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    app.cleanup_ctx.append(open_session)
    app.router.add_post(PATH, relay)
    return app


def ssl_context() -> ssl.SSLContext:
    """A new context, which trusts SSL_CERT_FILE. (aiohttp's default context is made when aiohttp is imported.)"""
    return ssl.create_default_context()


if __name__ == "__main__":
    web.run_app(
        build(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None, loop=uvloop.new_event_loop()
    )
