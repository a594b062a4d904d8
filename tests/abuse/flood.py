"""A flood, in a process of its own: `python -m tests.abuse.flood KIND URL KEY SECONDS CONNECTIONS`.

Each connection sends its next request as soon as the response has come. Prints a line when it begins, and then how many responses had which
status, as JSON. The
client has one address, by X-Forwarded-For, which the service believes of 127.0.0.1.
"""

import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from gptutor.money.amounts import AccountId
from gptutor.money.keys import make_key

ADDRESS = f"203.0.113.{random.randint(1, 250)}"
SMALL = b'{"messages": [{"role": "user", "content": "Hello"}]}'
NAMES = b'{"messages": [{"role": "user", "content": "Hello"}], "models": [%b]}' % b",".join(b'"a/%d"' % n for n in range(74_000))
LARGE = b'{"messages": [{"role": "user", "content": "%b"}]}' % (b"x" * 10_000_000)
NUMBERS = b'{"messages": [{"role": "user", "content": "Hello"}], "x": [%b]}' % b",".join([b"1"] * 49_000)


def request(method: str, path: str, key: str, body: bytes = b"") -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: {ADDRESS}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def chats(key: str, body: bytes) -> Iterator[bytes]:
    return itertools.repeat(request("POST", "/v1/chat/completions", key, body))


def made_up_keys(_: str) -> Iterator[bytes]:
    """Each key has the right checksum, and names an account that may exist."""
    while True:
        yield request("POST", "/v1/chat/completions", make_key(AccountId(random.randint(1, 3))), SMALL)


def unknown_paths(key: str) -> Iterator[bytes]:
    for number in itertools.count():
        yield request("GET", f"/{number}{'x' * 7000}", key)


def sign_ins(_: str) -> Iterator[bytes]:
    launch = "vk_access_token_settings=&vk_app_id=7&vk_platform=web&vk_ts=1795500000&vk_user_id=1&sign=AAAA"
    return itertools.repeat(request("GET", "/vk-test", launch))


KINDS: dict[str, Callable[[str], Iterator[bytes]]] = {
    "refused": lambda key: chats(key, SMALL),
    "made-up keys": made_up_keys,
    "names in models": lambda key: chats(key, NAMES),
    "numbers": lambda key: chats(key, NUMBERS),
    "10 MB": lambda key: chats(key, LARGE),
    "404": unknown_paths,
    "sign-ins": sign_ins,
}


async def flood(kind: str, url: str, key: str, seconds: float, connections: int) -> Counter[str]:
    address = urlsplit(url)
    until = time.monotonic() + seconds
    statuses: Counter[str] = Counter()

    async def send_requests() -> None:
        requests = KINDS[kind](key)
        while time.monotonic() < until:
            try:
                reader, writer = await asyncio.open_connection(address.hostname, address.port)
                try:
                    for bytes_ in requests:
                        writer.write(bytes_)
                        head = await reader.readuntil(b"\r\n\r\n")
                        length = next(
                            int(line.split(b":")[1])
                            for line in head.split(b"\r\n")
                            if line.lower().startswith(b"content-length:")
                        )
                        await reader.readexactly(length)
                        statuses[head[9:12].decode()] += 1
                        if b"\r\nConnection: close" in head or time.monotonic() >= until:
                            break
                finally:
                    writer.transport.abort()
            except (OSError, EOFError):
                statuses["broken"] += 1
                await asyncio.sleep(0.05)

    tasks = [asyncio.ensure_future(send_requests()) for _ in range(connections)]
    _, late = await asyncio.wait(tasks, timeout=seconds + 1)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return statuses


if __name__ == "__main__":
    kind, url, key, seconds, connections = sys.argv[1:]
    print("begin", flush=True)
    print(json.dumps(asyncio.run(flood(kind, url, key, float(seconds), int(connections)))))
