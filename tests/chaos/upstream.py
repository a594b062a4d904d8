"""OpenRouter for a storm: `gptutor simulator`, whose bills also say what was asked and under whose pseudonym.

A worker that dies between sending and hearing never learns the name of what it bought. The text of the request is then the only
link between the simulator's bill and our hold, so each one begins with its number (`ASK`), and the bills repeat it.
"""

import asyncio
import json
import re
import sys

from aiohttp import web

from gptutor.config import schema
from gptutor.server.serve import simulated_openrouter
from gptutor.simulator.generation import last_text
from gptutor.simulator.server import Simulator

ASK = re.compile(r"ask-\d+")


class TalkativeSimulator(Simulator):
    async def bills(self, request: web.Request) -> web.Response:
        bills = []
        for record in self.billing.records.values():
            asked = json.loads(record.body)
            found = ASK.match(last_text(asked["messages"]))
            bills.append(
                {
                    "id": record.generation_id,
                    "ask": found[0] if found else None,
                    "user": asked.get("user"),
                    "model": record.model,
                    "cancelled": record.cancelled,
                    "finished": record.finished,
                    "cost_usd": str(record.cost_usd),
                }
            )
        return web.json_response(bills)


async def main(port: int) -> None:
    simulator = TalkativeSimulator(word_s=0.005, first_word_s=0.03, generation_delay_s=0.3)
    async with simulated_openrouter(simulator, schema.SimulatorSettings(port=port)):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
