"""Faults of what OpenRouter says: refusals, errors of every form, and prices that are stated oddly or not at all."""

import re
from collections.abc import Callable
from dataclasses import replace

from gptutor.simulator.generation import Generation, dumps, with_words
from gptutor.simulator.script import DONE, STALL_S, Script, Step, event, mid_stream_error, refused, usage_event

INJECTED = ["\r\n\r\ndata: ", '{"usage":{"cost":0}}', "\n\n", "data: [DONE]\n\n", '"usage":{"cost":0},"error":{"code":1}} ']


class FaultError(ValueError):
    """No such fault, or not with this value, or not of such an answer."""


# -- of the answer itself: from a generation to a generation


def primary_down(generation: Generation, value: str) -> Generation:
    """`primary-down`: the first model of `models` that is another one answers, at its price."""
    if not generation.fallbacks:
        raise FaultError("there is no fallback")
    model, *others = generation.fallbacks
    return replace(generation, model=model, fallbacks=others)


def byok(generation: Generation, value: str) -> Generation:
    """`byok`: a provider's key of our own is used; OpenRouter charges its fee alone, and the provider the rest."""
    return replace(generation, byok=True)


def injected(generation: Generation, value: str) -> Generation:
    """`injected`: the model's words begin like an event that states a price of nothing."""
    return with_words(generation, INJECTED)


# -- of how it is said: from a script to a script


def status(script: Script, generation: Generation, value: str) -> Script:
    """`status=503` or `status=429:7`: an error instead of an answer, with Retry-After if a second number is given."""
    code, _, retry_after = value.partition(":")
    return refused(int(code), f"Simulated error {code}", {"Retry-After": retry_after} if retry_after else None)


def html(script: Script, generation: Generation, value: str) -> Script:
    """`html=524`: an edge's error page."""
    page = b"<!DOCTYPE html><html><title>Timeout</title><body>A timeout occurred</body></html>"
    return Script(int(value or 524), [Step(page)], content_type="text/html")


def no_code(script: Script, generation: Generation, value: str) -> Script:
    """`no-code`: a 429 in OpenRouter's newer form, which has no `code`."""
    model = generation.model.id
    availability = {"code": "rate_limited", "retryable": True, "retry_after": 1, "requested_models": [model]}
    message = "The model is rate-limited upstream"
    error = {"error_type": "rate_limit_exceeded", "http_status": 429, "message": message, "availability": availability}
    return Script(429, [Step(dumps({"error": error}))])


def redirect(script: Script, generation: Generation, value: str) -> Script:
    """`redirect=302`: elsewhere, to another host."""
    return Script(int(value or 302), [Step()], headers={"Location": "http://elsewhere.invalid/api/v1/chat/completions"})


def top_error(script: Script, generation: Generation, value: str) -> Script:
    """`top-error`: a 200 whose body is an error and nothing else; nothing is billed."""
    error = {"code": 502, "message": "Provider returned error", "metadata": {"error_type": "provider_error"}}
    return replace(_plain(script), steps=[Step(dumps({"error": error}))], billed_words=0)


def plain_error(script: Script, generation: Generation, value: str) -> Script:
    """`plain-error`: a plain answer that ended in a provider's error; what was said of it is billed."""
    (step,) = _plain(script).steps
    error = b'"finish_reason":"error","error":{"code":502,"message":"Provider disconnected"}'
    return script.with_steps([replace(step, data=re.sub(rb'"finish_reason":"[a-z_]+"', error, step.data))])


def midstream_error(script: Script, generation: Generation, value: str, code: int | str = 502) -> Script:
    """`error=3`: OpenRouter's own error event after so many steps, and the end; no price is stated or billed."""
    if int(value or 3) > len(script.steps) - 2:
        raise FaultError("the answer has stated its price by then")
    return replace(script, steps=[*script.steps[: int(value or 3)], Step(mid_stream_error(generation, code))], billed_words=0)


def string_code(script: Script, generation: Generation, value: str) -> Script:
    """`string-code=3`: the same error event, whose code is a word."""
    return midstream_error(script, generation, value, "server_error")


def no_usage(script: Script, generation: Generation, value: str) -> Script:
    """`no-usage`: the answer states no price; `/generation` knows it."""
    return script.with_steps([replace(step, data=_without_usage(step.data)) for step in script.steps])


def usage_value(script: Script, generation: Generation, value: str) -> Script:
    """`cost=null`, `cost=-1`, `cost=1e400`: a price that is none."""
    pattern = re.compile(rb'"cost":[^,}]+')
    return script.with_steps([replace(step, data=pattern.sub(b'"cost":' + value.encode(), step.data)) for step in script.steps])


def usage_twice(script: Script, generation: Generation, value: str) -> Script:
    """`usage-twice`: a price on the way, and the true one at the end."""
    *before, finish, usage, done = _stream(script)
    sooner = Step(usage_event(generation, len(generation.pieces) // 2), words=finish.words)
    return script.with_steps([*before, finish, sooner, usage, done])


def usage_early(script: Script, generation: Generation, value: str) -> Script:
    """`usage-early`: the price is stated, and due, in the middle of the answer; none at its end."""
    *before, finish, usage, done = _stream(script)
    half = len(before) // 2
    return script.with_steps(
        [*before[:half], *(replace(step, words=usage.words) for step in [usage, *before[half:], finish, done])]
    )


def usage_hang(script: Script, generation: Generation, value: str) -> Script:
    """`usage-hang`: silence where `[DONE]` should come."""
    *before, done = _stream(script)
    return script.with_steps([*before, replace(done, pause_s=STALL_S)])


def usage_in_finish(script: Script, generation: Generation, value: str) -> Script:
    """`usage-in-finish`: the price stands in the event that ends the answer, and not in one of its own."""
    *before, finish, _, done = _stream(script)
    end = event(generation, {"content": ""}, finish_reason=generation.finish_reason, usage=generation.usage())
    return script.with_steps([*before, replace(finish, data=end), done])


def _stream(script: Script) -> list[Step]:
    """The steps of a stream that still ends as streams do: in its end, its price and `[DONE]`."""
    if len(script.steps) < 4 or script.steps[-1].data != DONE:
        raise FaultError("only of a whole stream")
    return list(script.steps)


def _plain(script: Script) -> Script:
    if script.is_stream or script.billed_words is None:
        raise FaultError("only of a plain answer")
    return script


def _without_usage(data: bytes) -> bytes:
    if data.startswith(b"data: ") and b'"choices":[]' in data:
        return b""
    return re.sub(rb',"usage":\{.*\}\}$', b"}", data)


OF_GENERATIONS: dict[str, Callable[[Generation, str], Generation]] = {
    "primary-down": primary_down,
    "byok": byok,
    "injected": injected,
}
OF_SCRIPTS: dict[str, Callable[[Script, Generation, str], Script]] = {
    "status": status,
    "html": html,
    "no-code": no_code,
    "redirect": redirect,
    "top-error": top_error,
    "plain-error": plain_error,
    "error": midstream_error,
    "string-code": string_code,
    "no-usage": no_usage,
    "cost": usage_value,
    "usage-twice": usage_twice,
    "usage-early": usage_early,
    "usage-hang": usage_hang,
    "usage-in-finish": usage_in_finish,
}
