"""Faults on demand. A request asks for one by the header `X-Simulator-Fault: cut=3`, or by the words `fault:cut=3` in its last
message (which reach the simulator through any gateway). Each fault is a function from a script to a script; several may be asked
for and are applied in order.
"""

import random
import re
from collections.abc import Callable
from dataclasses import replace

from gptutor.openrouter.simulator.generation import Generation
from gptutor.openrouter.simulator.script import STALL_S, Script, Step, mid_stream_error, refused

ASKED = re.compile(r"fault:([a-z0-9-]+)(?:=([A-Za-z0-9.:_-]+))?")

Fault = Callable[[Script, Generation, str], Script]


class FaultError(ValueError):
    """No such fault, or not with this value."""


def status(script: Script, generation: Generation, value: str) -> Script:
    """`status=503` or `status=429:7`: an error instead of an answer, with Retry-After if a second number is given."""
    code, _, retry_after = value.partition(":")
    return refused(int(code), f"Simulated error {code}", {"Retry-After": retry_after} if retry_after else None)


def html(script: Script, generation: Generation, value: str) -> Script:
    """`html=524`: an edge's error page."""
    page = b"<!DOCTYPE html><html><title>Timeout</title><body>A timeout occurred</body></html>"
    return Script(int(value or 524), [Step(page)], content_type="text/html")


def slow(script: Script, generation: Generation, value: str) -> Script:
    """`slow=2`: so many seconds before the first byte of the body."""
    first, *others = script.steps
    return script.with_steps([replace(first, pause_s=first.pause_s + float(value or 2)), *others])


def cut(script: Script, generation: Generation, value: str) -> Script:
    """`cut=3`: the connection breaks after so many steps; the provider has finished, and bills all of it."""
    return script.with_steps([*script.steps[: int(value or 3)], Step(cut=True)])


def cut_inside(script: Script, generation: Generation, value: str) -> Script:
    """`cut-inside=3`: the connection breaks in the middle of the bytes of that step."""
    number = int(value or 3)
    half = script.steps[number].data[: len(script.steps[number].data) // 2]
    return script.with_steps([*script.steps[:number], Step(half), Step(cut=True)])


def stall(script: Script, generation: Generation, value: str) -> Script:
    """`stall=3`: silence after so many steps."""
    number = int(value or 3)
    return script.with_steps([*script.steps[:number], Step(pause_s=STALL_S), *script.steps[number:]])


def midstream_error(script: Script, generation: Generation, value: str) -> Script:
    """`error=3`: OpenRouter's own error event after so many steps, and the end; no price is stated or billed."""
    if int(value or 3) > len(script.steps) - 2:
        raise FaultError("the answer has stated its price by then")
    return replace(script, steps=[*script.steps[: int(value or 3)], Step(mid_stream_error(generation))], billed_words=0)


def no_usage(script: Script, generation: Generation, value: str) -> Script:
    """`no-usage`: the answer states no price; `/generation` knows it."""
    return script.with_steps([replace(step, data=_without_usage(step.data)) for step in script.steps])


def usage_value(script: Script, generation: Generation, value: str) -> Script:
    """`cost=null`, `cost=-1`, `cost=1e400`: a price that is none."""
    pattern = re.compile(rb'"cost":[^,}]+')
    return script.with_steps([replace(step, data=pattern.sub(b'"cost":' + value.encode(), step.data)) for step in script.steps])


def odd_chunks(script: Script, generation: Generation, value: str) -> Script:
    """`chunks=7`: the same bytes in pieces of random size up to that many, split anywhere; the seed is the size."""
    size = int(value or 7)
    dice = random.Random(size)
    steps = []
    for step in script.steps:
        data, pause_s = step.data, step.pause_s
        while len(data) > size:
            length = dice.randint(1, size)
            steps.append(Step(data[:length], pause_s, step.words))
            data, pause_s = data[length:], 0.0
        steps.append(replace(step, data=data, pause_s=pause_s))
    return script.with_steps(steps)


def one_write(script: Script, generation: Generation, value: str) -> Script:
    """`one-write`: the whole stream at once."""
    return script.with_steps([Step(b"".join(step.data for step in script.steps), words=script.steps[-1].words)])


def flood(script: Script, generation: Generation, value: str) -> Script:
    """`flood=20000000`: so many more bytes of comments before the end, for a caller who reads slowly or not at all."""
    line = b": " + b"x" * 65_000 + b"\n\n"
    extra = [Step(line, words=script.steps[-1].words) for _ in range(int(value or 10_000_000) // len(line))]
    return script.with_steps([*script.steps[:-3], *extra, *script.steps[-3:]])


FAULTS: dict[str, Fault] = {
    "status": status,
    "html": html,
    "slow": slow,
    "cut": cut,
    "cut-inside": cut_inside,
    "stall": stall,
    "error": midstream_error,
    "no-usage": no_usage,
    "cost": usage_value,
    "chunks": odd_chunks,
    "one-write": one_write,
    "flood": flood,
}


def apply_faults(script: Script, generation: Generation, asked: str) -> Script:
    """Raises FaultError."""
    for name, value in ASKED.findall(asked):
        try:
            script = FAULTS[name](script, generation, value)
        except (KeyError, ValueError, IndexError) as error:
            raise FaultError(f"fault:{name}={value} is not one of {', '.join(FAULTS)}") from error
    return script


def _without_usage(data: bytes) -> bytes:
    if data.startswith(b"data: ") and b'"choices":[]' in data:
        return b""
    return re.sub(rb',"usage":\{.*\}\}$', b"}", data)
