"""Faults of the transport: delays, stalls, broken connections, and unusual chunking, compression, headers or sizes."""

import random
import zlib
from collections.abc import Callable
from dataclasses import replace

from gptutor.simulator.generation import Generation
from gptutor.simulator.response_faults import FaultError
from gptutor.simulator.response_script import PROCESSING, STALL_S, Script, Step, delta_event

SHORT_PAUSE_S = 0.0005
UNUSUAL_HEADERS = {
    "Set-Cookie": "session=upstream; Path=/",
    "X-Evil": "1",
    "Server": "elsewhere",
    "CF-Ray": "0-SIM",
    "Access-Control-Allow-Origin": "*",
    "X-Request-ID": "req-of-upstream",
    "x-should-retry": "true",
}


def slow(script: Script, generation: Generation, value: str) -> Script:
    """`slow=2`: 2 more seconds before the first byte of the body."""
    first, *others = script.steps
    return script.with_steps([replace(first, pause_s=first.pause_s + float(value or 2)), *others])


def blanks(script: Script, generation: Generation, value: str) -> Script:
    """`blanks=3`: a plain response whose headers and 3 blank lines are sent while the model works."""
    if script.is_stream:
        raise FaultError("this fault needs a plain response")
    (whole,) = script.steps
    count = int(value or 3)
    pause_s = whole.pause_s / count
    return script.with_steps([Step(), *[Step(b"\n", pause_s)] * count, replace(whole, pause_s=0.0)])


def cut(script: Script, generation: Generation, value: str) -> Script:
    """`cut=3`: the connection is reset after 3 steps; the provider has finished, and the whole response is billed."""
    return script.with_steps([*script.steps[: int(value or 3)], Step(action="reset")])


def cut_inside(script: Script, generation: Generation, value: str) -> Script:
    """`cut-inside=3`: the connection is reset in the middle of the bytes of step 3 (the first is 0)."""
    index = int(value or 3)
    half = script.steps[index].data[: len(script.steps[index].data) // 2]
    return script.with_steps([*script.steps[:index], Step(half), Step(action="reset")])


def stall(script: Script, generation: Generation, value: str) -> Script:
    """`stall=3`: the response stalls after 3 steps."""
    number = int(value or 3)
    return script.with_steps([*script.steps[:number], Step(pause_s=STALL_S), *script.steps[number:]])


def rechunked(script: Script, generation: Generation, value: str) -> Script:
    """`chunks=7`: the same bytes in chunks of random size up to 7, split anywhere; the size is also the random seed."""
    size = int(value or 7)
    rng = random.Random(size)
    steps = []
    for step in script.steps:
        data, pause_s = step.data, step.pause_s
        while len(data) > size:
            length = rng.randint(1, size)
            steps.append(Step(data[:length], pause_s, step.billed_deltas))
            data, pause_s = data[length:], 0.0
        steps.append(replace(step, data=data, pause_s=pause_s))
    return script.with_steps(steps)


def drip(script: Script, generation: Generation, value: str) -> Script:
    """`drip=1`: writes of 1 byte each, with a short pause before each."""
    size = int(value or 1)
    return script.with_steps(
        [
            replace(step, data=step.data[start : start + size], pause_s=SHORT_PAUSE_S if start else step.pause_s)
            for step in script.steps
            for start in range(0, max(1, len(step.data)), size)
        ]
    )


def one_write(script: Script, generation: Generation, value: str) -> Script:
    """`one-write`: the whole stream in one write."""
    return script.with_steps([Step(b"".join(step.data for step in script.steps), billed_deltas=script.steps[-1].billed_deltas)])


def flood(script: Script, generation: Generation, value: str) -> Script:
    """`flood=20000000`: 20 MB of comments before the end, for clients that read slowly or not at all."""
    line = b": " + b"x" * 65_000 + b"\n\n"
    extra = [Step(line, billed_deltas=script.steps[-1].billed_deltas) for _ in range(int(value or 10_000_000) // len(line))]
    return script.with_steps([*script.steps[:-3], *extra, *script.steps[-3:]])


def comments(script: Script, generation: Generation, value: str) -> Script:
    """`comments=50`: 50 comments in the middle of the stream, with a short pause before each."""
    half = len(_require_stream(script).steps) // 2
    comment = Step(PROCESSING, SHORT_PAUSE_S, script.steps[half - 1].billed_deltas)
    return script.with_steps([*script.steps[:half], *[comment] * int(value or 50), *script.steps[half:]])


def big_line(script: Script, generation: Generation, value: str) -> Script:
    """`big-line=2000000`: one more event, in a single line of 2,000,000 bytes."""
    half = len(_require_stream(script).steps) // 2
    padding = int(value or 2_000_000) - len(delta_event(generation, {"content": ""})) + 2
    if padding < 0 or generation.choices > 1:
        raise FaultError("no event is as short as that")
    line = Step(delta_event(generation, {"content": "x" * padding}), billed_deltas=script.steps[half - 1].billed_deltas)
    return script.with_steps([*script.steps[:half], line, *script.steps[half:]])


def compressed(script: Script, generation: Generation, value: str) -> Script:
    """`gzip`: compressed, whatever Accept-Encoding the request has."""
    compressor = zlib.compressobj(wbits=31)
    steps = [replace(step, data=compressor.compress(step.data) + compressor.flush(zlib.Z_SYNC_FLUSH)) for step in script.steps]
    end = Step(compressor.flush(), billed_deltas=script.steps[-1].billed_deltas)
    return replace(script, steps=[*steps, end], headers={**script.headers, "Content-Encoding": "gzip"})


def unusual_headers(script: Script, generation: Generation, value: str) -> Script:
    """`odd-headers`: response headers that a gateway must not pass on."""
    return replace(script, headers={**UNUSUAL_HEADERS, **script.headers})


def bad_length(script: Script, generation: Generation, value: str) -> Script:
    """`bad-length=100`: the connection is closed 100 bytes before the end that Content-Length announces."""
    length = sum(len(step.data) for step in script.steps) + int(value or 100)
    return replace(
        script,
        steps=[*script.steps, Step(action="close")],
        headers={**script.headers, "Content-Length": str(length)},
    )


def bad_chunk(script: Script, generation: Generation, value: str) -> Script:
    """`bad-chunk=3`: after 3 steps, a chunk whose size is not a number."""
    number = int(value or 3)
    if not 0 < number <= len(script.steps):
        raise FaultError("there is no such step")
    bad = [Step(b"no-size\r\n{}\r\n", billed_deltas=script.steps[number - 1].billed_deltas, action="raw"), Step(action="close")]
    return script.with_steps([*script.steps[:number], *bad])


def _require_stream(script: Script) -> Script:
    if not script.is_stream:
        raise FaultError("this fault needs a stream")
    return script


TRANSPORT_FAULTS: dict[str, Callable[[Script, Generation, str], Script]] = {
    "slow": slow,
    "blanks": blanks,
    "cut": cut,
    "cut-inside": cut_inside,
    "stall": stall,
    "chunks": rechunked,
    "drip": drip,
    "one-write": one_write,
    "flood": flood,
    "comments": comments,
    "big-line": big_line,
    "gzip": compressed,
    "odd-headers": unusual_headers,
    "bad-length": bad_length,
    "bad-chunk": bad_chunk,
}
