"""Requests as bytes on a raw socket."""

import asyncio
import json
from urllib.parse import urlsplit

from tests.support.gateway import Client, Gateway


async def raw(gateway: Gateway, request: bytes, *, until_close_s: float = 5) -> bytes:
    """Sends bytes, and returns everything received until the server closes the connection. Raises TimeoutError if it does not."""
    parts = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(request)
        async with asyncio.timeout(until_close_s):
            return await reader.read()
    finally:
        writer.transport.abort()


def post(client: Client, *, version: str = "1.1", extra: str = "Connection: close\r\n", stream: bool = False) -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "stream": stream}).encode()
    headers = f"POST /v1/chat/completions HTTP/{version}\r\nHost: x\r\nAuthorization: Bearer {client.key}\r\n"
    return f"{headers}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body
