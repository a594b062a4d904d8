"""What a request costs in function calls: unlike time, the number does not depend on the load of the machine."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import aiohttp
import aiohttp_sse
import asyncpg
import pytest

import gptutor
from tests.support.gateway import Client, Gateway

OURS = str(Path(gptutor.__file__).parent)
SIMULATOR = f"{OURS}/simulator"
LIBRARIES = (
    str(Path(aiohttp.__file__).parent / "web"),
    str(Path(asyncpg.__file__).parent),
    str(Path(aiohttp_sse.__file__).parent),
)
REQUESTS = 20


class Calls:
    """Counts the calls that are made by the gateway's own code, and by the libraries that serve it, for each function."""

    def __init__(self) -> None:
        self.by_function: Counter[str] = Counter()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            file = frame.f_code.co_filename
            if (file.startswith(OURS) and not file.startswith(SIMULATOR)) or file.startswith(LIBRARIES):
                self.by_function[f"{Path(file).name}:{frame.f_code.co_qualname}"] += 1

    async def of(self, work: Callable[[], Any]) -> int:
        before = self.by_function.total()
        sys.setprofile(self)
        try:
            await work()
        finally:
            sys.setprofile(None)
        return self.by_function.total() - before


async def send_requests(gateway: Gateway, client: Client, *, stream: bool, times: int = REQUESTS, text: str = "Hello") -> None:
    body = json.dumps({"messages": [{"role": "user", "content": text}], "stream": stream}).encode()
    headers = {**client.headers, "Content-Type": "application/json"}
    for _ in range(times):
        async with gateway.session.post(gateway.chat_url, data=body, headers=headers) as response:
            assert response.status == 200
            await response.read()
    await gateway.idle()


@pytest.mark.parametrize("tuned", [{"recovery": {"poll_s": 3600}, "rate_limit": {"chat_per_minute": 0}}])
@pytest.mark.parametrize(("stream", "calls"), [(False, 790), (True, 1000)])
async def test_a_request_makes_at_most_so_many_calls(gateway: Gateway, stream: bool, calls: int) -> None:
    """Requests one after the other, so that they share no batches; the stream has about fifty chunks. The number for each function is
    printed: a failure shows where calls were added."""
    client = await gateway.client("10000")
    await send_requests(gateway, client, stream=stream)  # what is done once only is done now
    counted = Calls()
    per_request = await counted.of(lambda: send_requests(gateway, client, stream=stream)) / REQUESTS
    print(f"{per_request:.1f} calls")
    print("\n".join(f"{count / REQUESTS:7.1f} {name}" for name, count in counted.by_function.most_common(60)))
    assert calls * 0.7 < per_request < calls * 1.1  # far fewer: lower the number
