"""An answer as a script: a status, headers, and a timed sequence of steps. Faults are changes of a script."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gptutor.openrouter.simulator.generation import Generation, dumps

PROCESSING = b": OPENROUTER PROCESSING\n\n"
DONE = b"data: [DONE]\n\n"
STALL_S = 3600.0


@dataclass(frozen=True, slots=True)
class Step:
    """Wait, then send. `words` is how many words the caller has when these bytes are out; `cut` breaks the connection instead."""

    data: bytes = b""
    pause_s: float = 0.0
    words: int = 0
    cut: bool = False


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
    body = dumps(
        {
            "id": generation.generation_id,
            "provider": "Simulator",
            "model": generation.model.id,
            "object": "chat.completion",
            "created": generation.created,
            "choices": [
                {
                    "logprobs": None,
                    "finish_reason": generation.finish_reason,
                    "native_finish_reason": generation.finish_reason,
                    "index": index,
                    "message": {"role": "assistant", "content": "".join(generation.words), "refusal": None},
                }
                for index in range(generation.choices)
            ],
            "usage": generation.usage(),
        }
    )
    words = len(generation.words)
    step = Step(body, pause_s=first_word_s + word_s * words, words=words)
    return Script(200, [step], headers={"X-Generation-Id": generation.generation_id}, billed_words=words)


def streamed(generation: Generation, first_word_s: float, word_s: float) -> Script:
    steps = [Step(PROCESSING), Step(_event(generation, {"role": "assistant", "content": ""}), pause_s=first_word_s)]
    for count, word in enumerate(generation.words, start=1):
        steps.append(Step(_event(generation, {"content": word}), pause_s=word_s, words=count))
    words = len(generation.words)
    steps.append(Step(_event(generation, {"content": ""}, generation.finish_reason), words=words))
    steps.append(Step(_data({**_envelope(generation), "choices": [], "usage": generation.usage()}), words=words))
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


def mid_stream_error(generation: Generation) -> bytes:
    """The event by which OpenRouter says, after a 200, that a provider failed."""
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
    error = {"code": 502, "message": "Provider disconnected", "metadata": {"error_type": "provider_error"}}
    return _data({**_envelope(generation), "error": error, "choices": [choice]})


def _event(generation: Generation, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    choices = [
        {
            "index": index,
            "delta": delta,
            "finish_reason": finish_reason,
            "native_finish_reason": finish_reason,
            "logprobs": None,
        }
        for index in range(generation.choices)
    ]
    return _data({**_envelope(generation), "choices": choices})


def _envelope(generation: Generation) -> dict[str, object]:
    return {
        "id": generation.generation_id,
        "provider": "Simulator",
        "model": generation.model.id,
        "object": "chat.completion.chunk",
        "created": generation.created,
    }


def _data(event: dict[str, object]) -> bytes:
    return b"data: " + dumps(event) + b"\n\n"
