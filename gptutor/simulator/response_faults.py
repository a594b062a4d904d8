"""Faults of the content of responses: error statuses, error bodies and events, and missing, invalid or misplaced costs."""

import re
from collections.abc import Callable
from dataclasses import replace

from gptutor.simulator.generation import Generation, dumps, with_leading_text
from gptutor.simulator.response_script import (
    DONE,
    STALL_S,
    Script,
    Step,
    delta_event,
    error_response,
    mid_stream_error,
    usage_event_without_choices,
)

INJECTED_TEXT = ["\r\n\r\ndata: ", '{"usage":{"cost":0}}', "\n\n", "data: [DONE]\n\n", '"usage":{"cost":0},"error":{"code":1}} ']


class FaultError(ValueError):
    """Unknown fault, invalid value, or a fault that does not apply to this kind of response."""


# -- faults that change the generation


def primary_down(generation: Generation, value: str) -> Generation:
    """`primary-down`: the first fallback of `models` responds, at its own price."""
    if not generation.fallbacks:
        raise FaultError("the request has no fallback model")
    model, *others = generation.fallbacks
    return replace(generation, model=model, fallbacks=others)


def byok(generation: Generation, value: str) -> Generation:
    """`byok`: billed as with a provider key of the customer's own: OpenRouter charges only its fee, the provider the rest."""
    return replace(generation, is_byok=True)


def injected(generation: Generation, value: str) -> Generation:
    """`injected`: the text of the model begins with what looks like an event that states a cost of 0."""
    return with_leading_text(generation, INJECTED_TEXT)


# -- faults that change the script


def status(script: Script, generation: Generation, value: str) -> Script:
    """`status=503` or `status=429:7`: an error response; the second number is its Retry-After, in seconds."""
    code, _, retry_after = value.partition(":")
    return error_response(int(code), f"Simulated error {code}", {"Retry-After": retry_after} if retry_after else None)


def html(script: Script, generation: Generation, value: str) -> Script:
    """`html=524`: an HTML error page, as an edge proxy sends it."""
    page = b"<!DOCTYPE html><html><title>Timeout</title><body>A timeout occurred</body></html>"
    return Script(int(value or 524), [Step(page)], content_type="text/html")


def no_code(script: Script, generation: Generation, value: str) -> Script:
    """`no-code`: a 429 in OpenRouter's newer format, which has no `code`."""
    model = generation.model.id
    availability = {"code": "rate_limited", "retryable": True, "retry_after": 1, "requested_models": [model]}
    message = "The model is rate-limited upstream"
    error = {"error_type": "rate_limit_exceeded", "http_status": 429, "message": message, "availability": availability}
    return Script(429, [Step(dumps({"error": error}))])


def redirect(script: Script, generation: Generation, value: str) -> Script:
    """`redirect=302`: a redirect to another host."""
    return Script(int(value or 302), [Step()], headers={"Location": "http://elsewhere.invalid/api/v1/chat/completions"})


def top_error(script: Script, generation: Generation, value: str) -> Script:
    """`top-error`: status 200, with only an error in the body; nothing is billed."""
    error = {"code": 502, "message": "Provider returned error", "metadata": {"error_type": "provider_error"}}
    return replace(_require_plain(script), steps=[Step(dumps({"error": error}))], billed_deltas=0)


def plain_error(script: Script, generation: Generation, value: str) -> Script:
    """`plain-error`: a plain response that a provider error cut short; its content is billed."""
    (step,) = _require_plain(script).steps
    error = b'"finish_reason":"error","error":{"code":502,"message":"Provider disconnected"}'
    return script.with_steps([replace(step, data=re.sub(rb'"finish_reason":"[a-z_]+"', error, step.data))])


def midstream_error(script: Script, generation: Generation, value: str, code: int | str = 502) -> Script:
    """`error=3`: an error event of OpenRouter after 3 steps, then the end of the stream; no cost is stated or billed."""
    if int(value or 3) > len(script.steps) - 2:
        raise FaultError("the stream has already stated its cost by then")
    return replace(script, steps=[*script.steps[: int(value or 3)], Step(mid_stream_error(generation, code))], billed_deltas=0)


def string_code(script: Script, generation: Generation, value: str) -> Script:
    """`string-code=3`: like `error=3`, with a string as error code."""
    return midstream_error(script, generation, value, "server_error")


def no_usage(script: Script, generation: Generation, value: str) -> Script:
    """`no-usage`: the response states no cost; `GET /generation` does."""
    return script.with_steps([replace(step, data=_without_usage(step.data)) for step in script.steps])


def invalid_cost(script: Script, generation: Generation, value: str) -> Script:
    """`cost=null`, `cost=-1`, `cost=1e400`: an invalid cost."""
    pattern = re.compile(rb'"cost":[^,}]+')
    return script.with_steps([replace(step, data=pattern.sub(b'"cost":' + value.encode(), step.data)) for step in script.steps])


def usage_twice(script: Script, generation: Generation, value: str) -> Script:
    """`usage-twice`: a partial cost before the final one."""
    *before, finish, usage, done = _complete_stream(script)
    partial = Step(usage_event_without_choices(generation, len(generation.deltas) // 2), billed_deltas=finish.billed_deltas)
    return script.with_steps([*before, finish, partial, usage, done])


def usage_early(script: Script, generation: Generation, value: str) -> Script:
    """`usage-early`: the final cost is stated, and from then on billed, in the middle of the stream; none at its end."""
    *before, finish, usage, done = _complete_stream(script)
    usage = replace(usage, data=usage_event_without_choices(generation))
    half = len(before) // 2
    return script.with_steps(
        [*before[:half], *(replace(step, billed_deltas=usage.billed_deltas) for step in [usage, *before[half:], finish, done])]
    )


def usage_alone(script: Script, generation: Generation, value: str) -> Script:
    """`usage-alone`: the event with the usage has no choices, as OpenRouter documents it."""
    *before, usage, done = _complete_stream(script)
    return script.with_steps([*before, replace(usage, data=usage_event_without_choices(generation)), done])


def no_done(script: Script, generation: Generation, value: str) -> Script:
    """`no-done`: the stream ends without `[DONE]`."""
    *before, _ = _complete_stream(script)
    return script.with_steps(before)


def usage_hang(script: Script, generation: Generation, value: str) -> Script:
    """`usage-hang`: the stream stalls before `[DONE]`."""
    *before, done = _complete_stream(script)
    return script.with_steps([*before, replace(done, pause_s=STALL_S)])


def usage_in_finish(script: Script, generation: Generation, value: str) -> Script:
    """`usage-in-finish`: the usage is part of the event with the finish reason, instead of an event of its own."""
    *before, finish, _, done = _complete_stream(script)
    data = delta_event(generation, {"content": ""}, finish_reason=generation.finish_reason, usage=generation.usage())
    return script.with_steps([*before, replace(finish, data=data), done])


def _complete_stream(script: Script) -> list[Step]:
    """The steps of a stream whose last ones are still the finish reason, the usage and `[DONE]`. Raises FaultError for others."""
    if len(script.steps) < 4 or script.steps[-1].data != DONE:
        raise FaultError("this fault needs a complete stream")
    return list(script.steps)


def _require_plain(script: Script) -> Script:
    if script.is_stream or script.billed_deltas is None:
        raise FaultError("this fault needs a plain response")
    return script


def _without_usage(data: bytes) -> bytes:
    if data.startswith(b"data: ") and b',"usage":{' in data:
        return b""
    return re.sub(rb',"usage":\{.*\}\}$', b"}", data)


GENERATION_FAULTS: dict[str, Callable[[Generation, str], Generation]] = {
    "primary-down": primary_down,
    "byok": byok,
    "injected": injected,
}
RESPONSE_FAULTS: dict[str, Callable[[Script, Generation, str], Script]] = {
    "status": status,
    "html": html,
    "no-code": no_code,
    "redirect": redirect,
    "top-error": top_error,
    "plain-error": plain_error,
    "error": midstream_error,
    "string-code": string_code,
    "no-usage": no_usage,
    "cost": invalid_cost,
    "usage-twice": usage_twice,
    "usage-early": usage_early,
    "usage-alone": usage_alone,
    "no-done": no_done,
    "usage-hang": usage_hang,
    "usage-in-finish": usage_in_finish,
}
