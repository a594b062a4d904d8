"""A client that speaks HTTP to the service without a library, and forgives nothing."""

import asyncio
import json


class DirectClient:
    """Uses its connection until a response says `Connection: close`. A connection that ends otherwise is an error."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._key = key
        self.connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.closed_by_server = 0

    def request(self, text: str, *, stream: bool, close: bool = False) -> bytes:
        body = json.dumps({"messages": [{"role": "user", "content": text}], "stream": stream}).encode()
        return (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{'Connection: close' if close else 'X-No: 1'}\r\n\r\n"
        ).encode() + body

    async def complete(self, text: str = "Hi", *, stream: bool = False, close: bool = False) -> tuple[int, dict[str, str], bytes]:
        """Status, headers with small names, body. Raises OSError, EOFError."""
        if self.connection is None:
            self.connection = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self.connection
        writer.write(self.request(text, stream=stream, close=close))
        status, headers, body = await read_response(reader)
        if headers.get("connection") == "close":
            self.closed_by_server += not close
            self.close()
        return status, headers, body

    def close(self) -> None:
        if self.connection is not None:
            self.connection[1].close()
            self.connection = None


async def read_response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers with small names, body. Raises EOFError for a response that is cut off."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    status_line, *lines = head.split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
    if "content-length" in headers:
        return int(status_line.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))
    body = b""
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return int(status_line.split()[1]), headers, body
