"""A response as a script: a status, headers, and timed steps of bytes. A fault is a change of a script."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gptutor.simulator.generation import Generation, dumps
from gptutor.simulator.response_content import Delta

PROCESSING = b": OPENROUTER PROCESSING\n\n"
DONE = b"data: [DONE]\n\n"
STALL_S = 3600.0
FINGERPRINT = "fp_simulator"
OPERATOR = "user_simulator"


@dataclass(frozen=True, slots=True)
class Step:
    """A pause, then an action.

    `billed_deltas` is how many deltas are billed to a client that disconnects after these bytes. `write` sends the bytes as HTTP
    body, `raw` writes them to the socket without HTTP framing, `reset` and `close` end the connection instead.
    """

    data: bytes = b""
    pause_s: float = 0.0
    billed_deltas: int = 0
    action: Literal["write", "raw", "reset", "close"] = "write"


@dataclass(frozen=True, slots=True)
class Script:
    status: int
    steps: Sequence[Step]
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    billed_deltas: int | None = None
    """How many deltas are billed when the script was sent to its end; None: an error, and nothing is billed."""

    @property
    def is_stream(self) -> bool:
        return self.content_type == "text/event-stream"

    def with_steps(self, steps: Sequence[Step]) -> "Script":
        return replace(self, steps=steps)


def plain_response(generation: Generation, first_word_s: float, word_s: float) -> Script:
    choice = {
        "logprobs": generation.logprobs(generation.deltas),
        "finish_reason": generation.finish_reason,
        "native_finish_reason": generation.finish_reason,
    }
    choices = [{**choice, "index": index, "message": generation.message()} for index in range(generation.choices)]
    common = {**_common_fields(generation, "chat.completion"), "system_fingerprint": FINGERPRINT}
    body = dumps({**common, "choices": choices, "usage": generation.usage()})
    count = len(generation.deltas)
    step = Step(body, pause_s=first_word_s + word_s * count, billed_deltas=count)
    return Script(200, [step], headers={"X-Generation-Id": generation.generation_id}, billed_deltas=count)


def streamed_response(generation: Generation, first_word_s: float, word_s: float) -> Script:
    steps = [Step(PROCESSING), Step(delta_event(generation, {"role": "assistant", "content": ""}), pause_s=first_word_s)]
    for count, delta in enumerate(generation.deltas, start=1):
        steps.append(Step(delta_event(generation, delta), pause_s=word_s, billed_deltas=count))
    count = len(generation.deltas)
    if generation.media is not None:
        steps.append(Step(delta_event(generation, generation.media.delta), billed_deltas=count))
    finish = delta_event(generation, {"content": ""}, finish_reason=generation.finish_reason)
    steps += [Step(data, billed_deltas=count) for data in (finish, usage_event(generation), DONE)]
    return Script(
        200,
        steps,
        content_type="text/event-stream",
        headers={"X-Generation-Id": generation.generation_id},
        billed_deltas=count,
    )


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Script:
    """As OpenRouter's, it names the user of OpenRouter whose API key was used."""
    body = dumps({"error": {"code": status, "message": message}, "user_id": OPERATOR})
    return Script(status, [Step(body)], headers=headers or {})


def mid_stream_error(generation: Generation, code: int | str = 502) -> bytes:
    """The event with which OpenRouter reports, after a 200, that a provider failed."""
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
    error = {"code": code, "message": "Provider disconnected", "metadata": {"error_type": "provider_error"}}
    return _event({**_common_fields(generation), "error": error, "choices": [choice]})


def delta_event(
    generation: Generation, delta: Delta, *, finish_reason: str | None = None, usage: dict[str, Any] | None = None
) -> bytes:
    """An event with the same delta for every choice. Some providers put `usage` into the last of them."""
    choices = [
        {
            "index": index,
            "delta": delta,
            "finish_reason": finish_reason,
            "native_finish_reason": finish_reason,
            "logprobs": generation.logprobs([delta]) if delta.get("content") else None,
        }
        for index in range(generation.choices)
    ]
    return _event({**_common_fields(generation), "choices": choices, **({"usage": usage} if usage else {})})


def usage_event(generation: Generation) -> bytes:
    """The event with the usage, and so the cost. Its one choice has an empty delta, and repeats the finish reason."""
    reason = generation.finish_reason
    choice = {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "finish_reason": reason,
        "native_finish_reason": reason,
        "logprobs": None,
    }
    return _event({**_common_fields(generation), "choices": [choice], "usage": generation.usage()})


def usage_event_without_choices(generation: Generation, delta_count: int | None = None) -> bytes:
    """The same in the form that OpenRouter documents; the usage is that of the first `delta_count` deltas (all, if None)."""
    return _event({**_common_fields(generation), "choices": [], "usage": generation.usage(delta_count)})


def _common_fields(generation: Generation, kind: str = "chat.completion.chunk") -> dict[str, Any]:
    return {
        "id": generation.generation_id,
        "provider": "Simulator",
        "model": generation.model.id,
        "object": kind,
        "created": generation.created,
        "service_tier": generation.input.tier or "default",
    }


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"
