"""OpenRouter for the chaos test: the simulator, whose bills also contain the job and the user's pseudonym.

A worker that dies after it sent a request and before the response arrived never learns the generation id. The text of the request is
then the only link between the simulator's bill and the hold. So each text begins with the id of its job, and the bills contain it.
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

JOB_ID = re.compile(r"job-\d+")


class DetailedBillsSimulator(Simulator):
    async def bills(self, request: web.Request) -> web.Response:
        bills = []
        for record in self.billing.records.values():
            body = json.loads(record.body)
            job_id = JOB_ID.match(last_text(body["messages"]))
            bills.append(
                {
                    "id": record.generation_id,
                    "job_id": job_id[0] if job_id else None,
                    "user": body.get("user"),
                    "model": record.model,
                    "cancelled": record.cancelled,
                    "finished": record.finished,
                    "cost_usd": str(record.cost_usd),
                }
            )
        return web.json_response(bills)


async def main(port: int) -> None:
    simulator = DetailedBillsSimulator(word_s=0.005, first_word_s=0.03, generation_delay_s=0.3)
    async with simulated_openrouter(simulator, schema.SimulatorSettings(port=port)):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
