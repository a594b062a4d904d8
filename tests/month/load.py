"""The customers: plain requests and streams, on connections that are kept and on new ones, at a steady rate."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from tests.month.waiting import until
from tests.support.direct_client import DirectClient

CLIENTS = 15
DONE = b"data: [DONE]\n\n"
RESPONSE_S = 40.0


class Load:
    """Every request must be answered, and with 200 unless it runs while `troubled`: then also with the errors that are named there."""

    def __init__(self, port: int, keys: Sequence[str], per_second: float) -> None:
        self.answered = 0
        self.refused = Counter[str]()
        """Error code → answers, while troubled."""
        self.failed: list[str] = []
        self._port = port
        self._keys = keys
        self._period_s = CLIENTS / per_second
        self._expected: frozenset[str] = frozenset()
        self._running = 0
        self._goes_on = asyncio.Event()
        self._goes_on.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(self._customer(number, stream=number % 2 == 1, close=number % 3 == 2))

    async def _customer(self, number: int, *, stream: bool, close: bool) -> None:
        client = DirectClient(self._port, self._keys[number % len(self._keys)])
        await asyncio.sleep(self._period_s * number / CLIENTS)
        while True:
            if not self._goes_on.is_set():
                client.close()  # an idle connection would prolong a stop of the service
                await self._goes_on.wait()
            began_at = time.monotonic()
            self._running += 1
            try:
                await self._request(client, stream=stream, close=close)
            finally:
                self._running -= 1
            await asyncio.sleep(max(0.0, self._period_s - (time.monotonic() - began_at)))

    async def _request(self, client: DirectClient, *, stream: bool, close: bool) -> None:
        expected = self._expected
        kind = f"{'a stream' if stream else 'a plain request'} on {'a new connection' if close else 'a kept connection'}"
        try:
            async with asyncio.timeout(RESPONSE_S):
                status, headers, body = await client.complete(stream=stream, close=close)
        except (OSError, EOFError, ValueError) as error:
            client.close()
            self.failed.append(f"{kind} was not answered: {error!r}")
            return
        code = headers.get("x-error-code", "")
        if status == 200 and (not stream or body.endswith(DONE)):
            self.answered += 1
        elif status != 200 and code in expected | self._expected:
            self.refused[code] += 1
        else:
            self.failed.append(f"{kind} got {status} {code} {body[-200:]!r}")

    async def served(self, count: int, when: str) -> None:
        """Waits until so many more requests are answered. Raises Failed."""
        wanted = self.answered + count
        await until(lambda: self.answered >= wanted, f"Customers are not served {when}")

    async def refused_with(self, code: str, when: str) -> None:
        """Waits until this error was answered once more. Raises Failed."""
        wanted = self.refused[code] + 1
        await until(lambda: self.refused[code] >= wanted, f"No customer was told {code} {when}")

    @asynccontextmanager
    async def troubled(self, *codes: str) -> AsyncIterator[None]:
        self._expected = frozenset(codes)
        try:
            yield
        finally:
            self._expected = frozenset()

    async def pause(self) -> None:
        """No more requests are sent, and those that run have ended. Raises Failed."""
        self._goes_on.clear()
        await until(lambda: self._running == 0, "Requests do not end")

    def resume(self) -> None:
        self._goes_on.set()
