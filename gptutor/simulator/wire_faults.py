"""Faults of the way: slowness, silence, breaks, and bytes that come in odd pieces, odd wrappings or too many."""

import random
import zlib
from collections.abc import Callable
from dataclasses import replace

from gptutor.simulator.answer_faults import FaultError
from gptutor.simulator.generation import Generation
from gptutor.simulator.script import STALL_S, Script, Step, event

BREATH_S = 0.0005
ODD_HEADERS = {
    "Set-Cookie": "session=upstream; Path=/",
    "X-Evil": "1",
    "Server": "elsewhere",
    "CF-Ray": "0-SIM",
    "Access-Control-Allow-Origin": "*",
    "X-Request-ID": "req-of-upstream",
    "x-should-retry": "true",
}


def slow(script: Script, generation: Generation, value: str) -> Script:
    """`slow=2`: so many seconds before the first byte of the body."""
    first, *others = script.steps
    return script.with_steps([replace(first, pause_s=first.pause_s + float(value or 2)), *others])


def cut(script: Script, generation: Generation, value: str) -> Script:
    """`cut=3`: the connection breaks after so many steps; the provider has finished, and bills all of it."""
    return script.with_steps([*script.steps[: int(value or 3)], Step(act="reset")])


def cut_inside(script: Script, generation: Generation, value: str) -> Script:
    """`cut-inside=3`: the connection breaks in the middle of the bytes of that step."""
    number = int(value or 3)
    half = script.steps[number].data[: len(script.steps[number].data) // 2]
    return script.with_steps([*script.steps[:number], Step(half), Step(act="reset")])


def stall(script: Script, generation: Generation, value: str) -> Script:
    """`stall=3`: silence after so many steps."""
    number = int(value or 3)
    return script.with_steps([*script.steps[:number], Step(pause_s=STALL_S), *script.steps[number:]])


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


def drip(script: Script, generation: Generation, value: str) -> Script:
    """`drip=1`: so many bytes in a write, and a breath before each."""
    size = int(value or 1)
    return script.with_steps(
        [
            replace(step, data=step.data[start : start + size], pause_s=BREATH_S if start else step.pause_s)
            for step in script.steps
            for start in range(0, max(1, len(step.data)), size)
        ]
    )


def one_write(script: Script, generation: Generation, value: str) -> Script:
    """`one-write`: the whole stream at once."""
    return script.with_steps([Step(b"".join(step.data for step in script.steps), words=script.steps[-1].words)])


def flood(script: Script, generation: Generation, value: str) -> Script:
    """`flood=20000000`: so many more bytes of comments before the end, for a caller who reads slowly or not at all."""
    line = b": " + b"x" * 65_000 + b"\n\n"
    extra = [Step(line, words=script.steps[-1].words) for _ in range(int(value or 10_000_000) // len(line))]
    return script.with_steps([*script.steps[:-3], *extra, *script.steps[-3:]])


def comments(script: Script, generation: Generation, value: str) -> Script:
    """`comments=50`: so many comments, with a breath before each, between the words."""
    half = len(_stream(script).steps) // 2
    comment = Step(b": OPENROUTER PROCESSING\n\n", BREATH_S, script.steps[half - 1].words)
    return script.with_steps([*script.steps[:half], *[comment] * int(value or 50), *script.steps[half:]])


def big_line(script: Script, generation: Generation, value: str) -> Script:
    """`big-line=2000000`: one event more, a single line of so many bytes."""
    half = len(_stream(script).steps) // 2
    missing = int(value or 2_000_000) - len(event(generation, {"content": ""})) + 2
    if missing < 0 or generation.choices > 1:
        raise FaultError("there is no event as short as that")
    line = Step(event(generation, {"content": "x" * missing}), words=script.steps[half - 1].words)
    return script.with_steps([*script.steps[:half], line, *script.steps[half:]])


def compressed(script: Script, generation: Generation, value: str) -> Script:
    """`gzip`: compressed, whatever was asked for."""
    packer = zlib.compressobj(wbits=31)
    steps = [replace(step, data=packer.compress(step.data) + packer.flush(zlib.Z_SYNC_FLUSH)) for step in script.steps]
    end = Step(packer.flush(), words=script.steps[-1].words)
    return replace(script, steps=[*steps, end], headers={**script.headers, "Content-Encoding": "gzip"})


def odd_headers(script: Script, generation: Generation, value: str) -> Script:
    """`odd-headers`: headers beside the answer that are not meant for any caller."""
    return replace(script, headers={**ODD_HEADERS, **script.headers})


def bad_length(script: Script, generation: Generation, value: str) -> Script:
    """`bad-length=100`: Content-Length promises so many bytes more than come before the connection is closed."""
    length = sum(len(step.data) for step in script.steps) + int(value or 100)
    return replace(
        script,
        steps=[*script.steps, Step(act="close")],
        headers={**script.headers, "Content-Length": str(length)},
    )


def bad_chunk(script: Script, generation: Generation, value: str) -> Script:
    """`bad-chunk=3`: after so many steps the next chunk's size is no number."""
    number = int(value or 3)
    if not 0 < number <= len(script.steps):
        raise FaultError("there is no such step")
    bad = [Step(b"no-size\r\n{}\r\n", words=script.steps[number - 1].words, act="raw"), Step(act="close")]
    return script.with_steps([*script.steps[:number], *bad])


def _stream(script: Script) -> Script:
    if not script.is_stream:
        raise FaultError("only of a stream")
    return script


OF_THE_WAY: dict[str, Callable[[Script, Generation, str], Script]] = {
    "slow": slow,
    "cut": cut,
    "cut-inside": cut_inside,
    "stall": stall,
    "chunks": odd_chunks,
    "drip": drip,
    "one-write": one_write,
    "flood": flood,
    "comments": comments,
    "big-line": big_line,
    "gzip": compressed,
    "odd-headers": odd_headers,
    "bad-length": bad_length,
    "bad-chunk": bad_chunk,
}
