"""The load: clients with requests of all kinds, half of which disconnect before the end of the response."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

from tests.chaos.processes import Worker

RESPONSE_S = 30
MODELS = (  # the first three are cancelled when a client disconnects; the others are billed to their end
    "anthropic/claude-3-haiku",
    "openai/gpt-4o-mini",
    "openai/gpt-1-nano:free",
    "google/gemini-2.5-flash-lite",
    "mistralai/mistral-1-pro",
    "openrouter/auto",
)
EXPENSIVE_MODEL = "openai/gpt-1-ultra"
FAULTS = (
    "cut={n}", "cut-inside={n}", "no-usage", "no-usage chunks=5", "chunks=5", "chunks=40", "one-write", "slow=0.4",
    "error={early}",  # before the usage: a response that states a cost must be billed
    "stall={n}", "status=503", "status=429:1", "status=400", "html=524", "cost=null", "cost=-1", "cost=1e400",
)  # fmt: skip
FAULT_PROBABILITY = 0.4


@dataclass(frozen=True, slots=True)
class Account:
    """A user with an API key; `is_poor` if the balance does not suffice for several requests at once."""

    key: str
    account_id: int
    is_poor: bool


@dataclass(frozen=True, slots=True)
class Job:
    """One chat completion to request. With an idempotency key it is requested several times."""

    job_id: str
    account: Account
    body: bytes
    is_stream: bool
    is_idempotent: bool


@dataclass
class Clients:
    """`outcomes` counts what clients received; `generation_ids` are those in response headers that reached a client."""

    accounts: Sequence[Account]
    workers: Sequence[Worker]
    rng: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    generation_ids: set[str] = field(default_factory=set)
    descriptions: dict[str, str] = field(default_factory=dict)
    """Stream or plain and the faults of each job, by job id, for the list of holds that remain open."""
    jobs: int = 0
    requests: int = 0

    async def run(self, count: int, is_over: Callable[[], bool]) -> None:
        """Runs `count` clients until `is_over`, and waits for their last requests."""
        timeout = aiohttp.ClientTimeout(total=RESPONSE_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            rngs = [random.Random(self.rng.random()) for _ in range(count)]
            async with asyncio.TaskGroup() as group:
                for rng in rngs:
                    group.create_task(self._run_client(session, rng, is_over))

    async def _run_client(self, session: aiohttp.ClientSession, rng: random.Random, is_over: Callable[[], bool]) -> None:
        while not is_over():
            account = rng.choice(self.accounts)
            if account.is_poor:  # all at once, more than the balance
                await asyncio.gather(*(self._send(session, rng, self._make_job(rng, account), 1) for _ in range(6)))
                await asyncio.sleep(rng.uniform(0.5, 2.0))
            else:
                await self._request(session, rng, self._make_job(rng, account))
            await asyncio.sleep(rng.uniform(0, 0.2))

    async def _request(self, session: aiohttp.ClientSession, rng: random.Random, job: Job) -> None:
        """Sends one request; with an idempotency key, the same several times, concurrently or one after the other."""
        if not job.is_idempotent:
            await self._send(session, rng, job, 1)
        elif rng.random() < 0.5:
            await asyncio.gather(*(self._send(session, rng, job, attempt) for attempt in (1, 2)))
        else:
            for attempt in (1, 2, 3):
                await self._send(session, rng, job, attempt)

    def _make_job(self, rng: random.Random, account: Account) -> Job:
        self.jobs += 1
        job_id = f"job-{self.jobs}"
        stream = rng.random() < 0.7
        text = [job_id, "x" * rng.randint(0, 300)]
        self.descriptions[job_id] = "stream" if stream else "plain"
        if rng.random() < FAULT_PROBABILITY:
            # The steps of a stream are a comment, the role, words, the finish reason, the usage and [DONE]; a plain response is one step.
            last, early = (20, 6) if stream else (1, 0)
            fault = rng.choice(FAULTS).format(n=rng.randint(0, last), early=rng.randint(0, early))
            text += [f"fault:{word}" for word in fault.split()]
            self.descriptions[job_id] += f" {fault}"
        body = {
            "model": EXPENSIVE_MODEL if account.is_poor else rng.choice(MODELS),
            "messages": [{"role": "user", "content": " ".join(text)}],
            "stream": stream,
        }
        if account.is_poor or rng.random() < 0.5:
            body["max_tokens"] = rng.choice((5, 20, 60, 200))
        return Job(job_id, account, json.dumps(body).encode(), stream, is_idempotent=rng.random() < 0.15)

    async def _send(self, session: aiohttp.ClientSession, rng: random.Random, job: Job, attempt: int) -> None:
        headers = {
            "Authorization": f"Bearer {job.account.key}",
            "Content-Type": "application/json",
            "X-Request-ID": f"{job.job_id}.{attempt}",  # stored with the hold, which links it to the simulator's bill
        }
        if job.is_idempotent:
            headers["Idempotency-Key"] = job.job_id
        # As a load balancer does, send most requests to workers that listen.
        listening = [worker for worker in self.workers if worker.is_listening]
        candidates = self.workers if rng.random() < 0.1 else listening or self.workers
        behaviour = rng.choice(("stays", "stays", "disconnects by time", "disconnects by bytes"))
        self.requests += 1
        try:
            async with asyncio.timeout(rng.uniform(0, 0.6) if behaviour == "disconnects by time" else None):
                url = f"{rng.choice(candidates).url}/v1/chat/completions"
                async with session.post(url, data=job.body, headers=headers) as response:
                    if generation_id := response.headers.get("X-Generation-Id"):
                        self.generation_ids.add(generation_id)
                    await self._read(response, rng.randint(1, 12_000) if behaviour == "disconnects by bytes" else None)
            if response.status == 503:
                await asyncio.sleep(rng.uniform(0.1, 1.0))  # Retry-After says a second
        except TimeoutError:
            self.outcomes["disconnected" if behaviour == "disconnects by time" else f"no response in {RESPONSE_S} s"] += 1
        except (aiohttp.ClientError, OSError):
            self.outcomes["connection lost"] += 1
            await asyncio.sleep(0.05)

    async def _read(self, response: aiohttp.ClientResponse, disconnect_at: int | None) -> None:
        received = 0
        async for chunk in response.content.iter_any():
            received += len(chunk)
            if disconnect_at is not None and received >= disconnect_at:
                response.close()
                self.outcomes["disconnected"] += 1
                return
        self.outcomes[str(response.status)] += 1
