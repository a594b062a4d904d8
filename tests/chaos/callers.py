"""The load: callers who ask in all ways, half of whom do not wait for the end."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

from tests.chaos.stage import Worker

ANSWER_S = 30
MODELS = (  # the first three are cancelled when a caller leaves; the others are billed to their end
    "anthropic/claude-3-haiku",
    "openai/gpt-4o-mini",
    "openai/gpt-1-nano:free",
    "google/gemini-2.5-flash-lite",
    "mistralai/mistral-1-pro",
    "openrouter/auto",
)
DEAR = "openai/gpt-1-ultra"
FAULTS = (
    "cut={n}", "cut-inside={n}", "no-usage", "no-usage chunks=5", "chunks=5", "chunks=40", "one-write", "slow=0.4",
    "error={early}",  # not after the usage: an answer that states a price and is not billed contradicts itself
    "stall={n}", "status=503", "status=429:1", "status=400", "html=524", "cost=null", "cost=-1", "cost=1e400",
)  # fmt: skip
FAULTY = 0.4


@dataclass(frozen=True, slots=True)
class Account:
    """A user; `is_poor` if several of its requests at once are more than it can pay."""

    key: str
    account_id: int
    is_poor: bool


@dataclass(frozen=True, slots=True)
class Ask:
    """One thing that is wanted, and may be asked for several times if it has an idempotency key."""

    name: str
    account: Account
    body: bytes
    is_stream: bool
    is_idempotent: bool


@dataclass
class Callers:
    """`crew` are the workers. `outcomes` counts what callers saw; `names` are the generations whose headers reached one."""

    accounts: Sequence[Account]
    crew: Sequence[Worker]
    dice: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    names: set[str] = field(default_factory=set)
    wishes: dict[str, str] = field(default_factory=dict)
    """What each ask is, in words, for the list of those that nobody can settle."""
    asks: int = 0
    requests: int = 0

    async def call(self, count: int, is_over: Callable[[], bool]) -> None:
        """So many callers at once, until it is over; the last ones are seen off."""
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            dice = [random.Random(self.dice.random()) for _ in range(count)]
            async with asyncio.TaskGroup() as group:
                for own in dice:
                    group.create_task(self._caller(session, own, is_over))

    async def _caller(self, session: aiohttp.ClientSession, dice: random.Random, is_over: Callable[[], bool]) -> None:
        while not is_over():
            account = dice.choice(self.accounts)
            if account.is_poor:  # more than it has, all at once
                await asyncio.gather(*(self._send(session, dice, self._ask(dice, account), 1) for _ in range(6)))
                await asyncio.sleep(dice.uniform(0.5, 2.0))
            else:
                await self._pursue(session, dice, self._ask(dice, account))
            await asyncio.sleep(dice.uniform(0, 0.2))

    async def _pursue(self, session: aiohttp.ClientSession, dice: random.Random, ask: Ask) -> None:
        """One request; with an idempotency key, the same again, after the first or beside it."""
        if not ask.is_idempotent:
            await self._send(session, dice, ask, 1)
        elif dice.random() < 0.5:
            await asyncio.gather(*(self._send(session, dice, ask, attempt) for attempt in (1, 2)))
        else:
            for attempt in (1, 2, 3):
                await self._send(session, dice, ask, attempt)

    def _ask(self, dice: random.Random, account: Account) -> Ask:
        self.asks += 1
        name = f"ask-{self.asks}"
        stream = dice.random() < 0.7
        text = [name, "x" * dice.randint(0, 300)]
        self.wishes[name] = "stream" if stream else "plain"
        if dice.random() < FAULTY:
            # The steps of a stream are a comment, a role, words, an end, the usage and [DONE]; a plain answer is one step.
            last, early = (20, 6) if stream else (1, 0)
            fault = dice.choice(FAULTS).format(n=dice.randint(0, last), early=dice.randint(0, early))
            text += [f"fault:{word}" for word in fault.split()]
            self.wishes[name] += f" {fault}"
        body = {
            "model": DEAR if account.is_poor else dice.choice(MODELS),
            "messages": [{"role": "user", "content": " ".join(text)}],
            "stream": stream,
        }
        if account.is_poor or dice.random() < 0.5:
            body["max_tokens"] = dice.choice((5, 20, 60, 200))
        return Ask(name, account, json.dumps(body).encode(), stream, is_idempotent=dice.random() < 0.15)

    async def _send(self, session: aiohttp.ClientSession, dice: random.Random, ask: Ask, attempt: int) -> None:
        headers = {
            "Authorization": f"Bearer {ask.account.key}",
            "Content-Type": "application/json",
            "X-Request-ID": f"{ask.name}.{attempt}",  # stands in the hold, and so ties it to the simulator's bill
        }
        if ask.is_idempotent:
            headers["Idempotency-Key"] = ask.name
        # A balancer sends most requests to workers that listen.
        crew = self.crew if dice.random() < 0.1 else [worker for worker in self.crew if worker.is_listening] or self.crew
        mood = dice.choice(("stays", "stays", "leaves by time", "leaves by bytes"))
        self.requests += 1
        try:
            async with asyncio.timeout(dice.uniform(0, 0.6) if mood == "leaves by time" else None):
                url = f"{dice.choice(crew).url}/v1/chat/completions"
                async with session.post(url, data=ask.body, headers=headers) as response:
                    if name := response.headers.get("X-Generation-Id"):
                        self.names.add(name)
                    await self._read(response, dice.randint(1, 12_000) if mood == "leaves by bytes" else None)
            if response.status == 503:
                await asyncio.sleep(dice.uniform(0.1, 1.0))  # Retry-After says a second
        except TimeoutError:
            self.outcomes["left" if mood == "leaves by time" else f"no answer in {ANSWER_S} s"] += 1
        except (aiohttp.ClientError, OSError):
            self.outcomes["connection lost"] += 1
            await asyncio.sleep(0.05)

    async def _read(self, response: aiohttp.ClientResponse, leave_at: int | None) -> None:
        heard = 0
        async for chunk in response.content.iter_any():
            heard += len(chunk)
            if leave_at is not None and heard >= leave_at:
                response.close()
                self.outcomes["left"] += 1
                return
        self.outcomes[str(response.status)] += 1
