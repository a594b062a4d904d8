"""The content of a simulated response, as the request asks for it: text, tool calls, reasoning, images and audio."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptutor.simulator.json_schema import sample
from gptutor.simulator.model_library import SimulatedModel

RUSSIAN_TEXT = (
    "Привет! Это симулятор OpenRouter: никакая модель не вызывалась, но всё остальное настоящее — запрос прошёл через шлюз, "
    "стоимость рассчитана по прайс-листу, и рубли списаны до последней цифры. Вы написали: «{prompt}»."
)
ENGLISH_TEXT = (
    "Hello! This is the OpenRouter simulator: no model was called, but everything else is real — the request went through the "
    "gateway, the bill follows the price list, and the roubles are exact to the last digit. You wrote: “{prompt}”."
)
TOOL_RESULT_TEXT = "The simulated model has read the result of the tool: “{prompt}”."
REASONING_TEXT = "The question is simple, and the answer is always the same. It can be given at once."
REASONING_REPEATS = {"none": 0, "minimal": 1, "low": 1, "medium": 2, "high": 4, "xhigh": 8}
ECHO_CHARACTERS = 200
IMAGE_TOKENS = 1290
AUDIO_TOKENS = 120
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
SILENCE = "UklGRiQAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YQAAAAA="
FRAGMENT = re.compile(r".{1,8}", re.DOTALL)

Delta = dict[str, Any]
"""The `delta` object of one streamed event. The whole message is the sum of its deltas."""


@dataclass(frozen=True, slots=True)
class Media:
    """An image or audio that follows the text of a response, and its tokens."""

    delta: Delta
    image_tokens: int = 0
    audio_tokens: int = 0


class NoEndpoint(Exception):
    """No provider of the model supports the request."""


def split_words(text: str) -> list[str]:
    return [word if index == 0 else f" {word}" for index, word in enumerate(text.split(" "))]


def make_text(request: dict[str, Any], prompt: str) -> str:
    response_format = request.get("response_format") or {}
    kind = response_format.get("type")
    if kind == "json_schema":
        return json.dumps(sample(response_format["json_schema"].get("schema", {})), ensure_ascii=False)
    template = RUSSIAN_TEXT if any("а" <= letter <= "я" for letter in prompt.lower()) else ENGLISH_TEXT
    if request["messages"][-1].get("role") == "tool":
        template = TOOL_RESULT_TEXT
    text = template.format(prompt=prompt[:ECHO_CHARACTERS])
    return json.dumps({"answer": text}, ensure_ascii=False) if kind == "json_object" else text


def make_tool_calls(request: dict[str, Any], prompt: str) -> list[tuple[str, str]]:
    """Name and JSON arguments of each function to call: those in `tool_choice`, or named in the prompt as `tool:NAME`."""
    functions = {
        tool["function"]["name"]: tool["function"].get("parameters") or {"type": "object"}
        for tool in request.get("tools") or []
        if tool["type"] == "function"
    }
    choice = request.get("tool_choice") or "auto"
    if not functions or choice == "none" or request["messages"][-1].get("role") == "tool":
        return []
    if isinstance(choice, dict) and choice["type"] == "allowed_tools":
        allowed = {tool["function"]["name"] for tool in choice["allowed_tools"]["tools"]}
        functions = {name: parameters for name, parameters in functions.items() if name in allowed}
        choice = choice["allowed_tools"]["mode"]
    if isinstance(choice, dict):
        names = [choice["function"]["name"]]
    else:
        names = [name for name in functions if re.search(rf"tool:{re.escape(name)}(?![\w-])", prompt)]
        if not names and (choice == "required" or "tool" in prompt.lower()):
            names = [next(iter(functions))]
    if request.get("parallel_tool_calls") is False:
        names = names[:1]
    return [(name, json.dumps(sample(functions[name]), ensure_ascii=False)) for name in names]


def tool_call_deltas(generation_id: str, calls: Sequence[tuple[str, str]]) -> list[Delta]:
    deltas: list[Delta] = []
    for index, (name, arguments) in enumerate(calls):
        function = {"name": name, "arguments": ""}
        first = {"index": index, "id": f"call_{generation_id}_{index}", "type": "function", "function": function}
        deltas.append({"tool_calls": [first]})
        deltas += (
            {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]} for fragment in FRAGMENT.findall(arguments)
        )
    return deltas


def make_reasoning(request: dict[str, Any]) -> tuple[list[str], bool]:
    """The words of the reasoning before the text, and whether the response shows them."""
    options = request.get("reasoning") or {}
    effort = options.get("effort") or request.get("reasoning_effort")
    is_requested = options or effort or str(request.get("model")).endswith(":thinking")
    if not is_requested or options.get("enabled") is False:
        return [], False
    words = split_words(" ".join([REASONING_TEXT] * REASONING_REPEATS[effort or "medium"])) if effort != "none" else []
    return words[: options.get("max_tokens")], not options.get("exclude")


def reasoning_detail(text: str) -> dict[str, Any]:
    return {"type": "reasoning.text", "text": text, "format": "unknown", "index": 0}


def make_media(generation_id: str, request: dict[str, Any], model: SimulatedModel) -> Media | None:
    modalities = set(request.get("modalities") or ["text"]) - {"text"}
    if not modalities <= set(model.outputs):
        raise NoEndpoint("No endpoints found that support the requested output modalities: " + ", ".join(sorted(modalities)))
    if "image" in modalities:
        image = {"type": "image_url", "image_url": {"url": PIXEL}, "index": 0}
        return Media({"images": [image]}, image_tokens=IMAGE_TOKENS)
    if "audio" in modalities:
        audio = {"id": f"audio_{generation_id}", "data": SILENCE, "transcript": "Hello!"}
        return Media({"audio": audio}, audio_tokens=AUDIO_TOKENS)
    return None
