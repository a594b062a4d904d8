"""An answer as a script: a status, headers, and a timed sequence of steps. Faults are changes of a script."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gptutor.simulator.generation import Generation, dumps
from gptutor.simulator.speech import Delta

PROCESSING = b": OPENROUTER PROCESSING\n\n"
DONE = b"data: [DONE]\n\n"
STALL_S = 3600.0


@dataclass(frozen=True, slots=True)
class Step:
    """Wait, then act. `words` is how many words are billed to a caller who leaves when these bytes are out.

    `write` is a write of HTTP's, `raw` goes past its framing onto the socket; `reset` and `close` end the connection instead.
    """

    data: bytes = b""
    pause_s: float = 0.0
    words: int = 0
    act: Literal["write", "raw", "reset", "close"] = "write"


@dataclass(frozen=True, slots=True)
class Script:
    status: int
    steps: Sequence[Step]
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    billed_words: int | None = None
    """How many words are billed when the script is played to its end; None: nothing is billed."""

    @property
    def is_stream(self) -> bool:
        return self.content_type == "text/event-stream"

    def with_steps(self, steps: Sequence[Step]) -> "Script":
        return replace(self, steps=steps)


def plain(generation: Generation, first_word_s: float, word_s: float) -> Script:
    choice = {
        "logprobs": generation.logprobs(generation.pieces),
        "finish_reason": generation.finish_reason,
        "native_finish_reason": generation.finish_reason,
    }
    choices = [{**choice, "index": index, "message": generation.message()} for index in range(generation.choices)]
    body = dumps({**_envelope(generation, "chat.completion"), "choices": choices, "usage": generation.usage()})
    words = len(generation.pieces)
    step = Step(body, pause_s=first_word_s + word_s * words, words=words)
    return Script(200, [step], headers={"X-Generation-Id": generation.generation_id}, billed_words=words)


def streamed(generation: Generation, first_word_s: float, word_s: float) -> Script:
    steps = [Step(PROCESSING), Step(event(generation, {"role": "assistant", "content": ""}), pause_s=first_word_s)]
    for count, piece in enumerate(generation.pieces, start=1):
        steps.append(Step(event(generation, piece), pause_s=word_s, words=count))
    words = len(generation.pieces)
    if generation.media is not None:
        steps.append(Step(event(generation, generation.media.delta), words=words))
    steps.append(Step(event(generation, {"content": ""}, finish_reason=generation.finish_reason), words=words))
    steps.append(Step(usage_event(generation), words=words))
    steps.append(Step(DONE, words=words))
    return Script(
        200,
        steps,
        content_type="text/event-stream",
        headers={"X-Generation-Id": generation.generation_id},
        billed_words=words,
    )


def refused(status: int, message: str, headers: dict[str, str] | None = None) -> Script:
    return Script(status, [Step(dumps({"error": {"code": status, "message": message}}))], headers=headers or {})


def mid_stream_error(generation: Generation, code: int | str = 502) -> bytes:
    """The event by which OpenRouter says, after a 200, that a provider failed."""
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
    error = {"code": code, "message": "Provider disconnected", "metadata": {"error_type": "provider_error"}}
    return _data({**_envelope(generation), "error": error, "choices": [choice]})


def event(
    generation: Generation, delta: Delta, *, finish_reason: str | None = None, usage: dict[str, Any] | None = None
) -> bytes:
    """A piece of the answer, the same for every choice; `usage` is beside it where a provider states its price so."""
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
    return _data({**_envelope(generation), "choices": choices, **({"usage": usage} if usage else {})})


def usage_event(generation: Generation, words: int | None = None) -> bytes:
    """The price of so many words (of all, if None), as a stream states it."""
    return _data({**_envelope(generation), "choices": [], "usage": generation.usage(words)})


def _envelope(generation: Generation, kind: str = "chat.completion.chunk") -> dict[str, Any]:
    tier = generation.given.tier
    return {
        "id": generation.generation_id,
        "provider": "Simulator",
        "model": generation.model.id,
        "object": kind,
        "created": generation.created,
        **({"service_tier": tier} if tier else {}),
    }


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"
