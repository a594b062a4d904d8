"""What a simulated model says: words, calls of functions, thoughts, images; each from what the request asks for."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptutor.simulator.library import SimulatedModel
from gptutor.simulator.schema import sample

RUSSIAN = (
    "Привет! Это симулятор OpenRouter: никакая модель не спрошена, но всё остальное настоящее — запрос прошёл через шлюз, "
    "счёт посчитан по прайс-листу, и рубли списаны до последней цифры. Вы написали: «{prompt}»."
)
ENGLISH = (
    "Hello! This is the OpenRouter simulator: no model was asked, but everything else is real — the request went through the "
    "gateway, the bill follows the price list, and the roubles are exact to the last digit. You wrote: “{prompt}”."
)
AFTER_A_TOOL = "The simulated model has read what the tool answered: “{prompt}”."
THOUGHT = "The question is plain, and the answer is always the same. It can be given at once."
EFFORTS = {"none": 0, "minimal": 1, "low": 1, "medium": 2, "high": 4, "xhigh": 8}
ECHO_CHARACTERS = 200
IMAGE_TOKENS = 1290
SOUND_TOKENS = 120
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
SILENCE = "UklGRiQAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YQAAAAA="
FRAGMENT = re.compile(r".{1,8}", re.DOTALL)

Delta = dict[str, Any]
"""A piece of an answer as a stream says it. The whole message is the sum of its pieces."""


@dataclass(frozen=True, slots=True)
class Media:
    """What follows the words of an answer: an image or a sound, of so many tokens."""

    delta: Delta
    images: int = 0
    audio: int = 0


class NoEndpoint(Exception):
    """No provider of the model does what is asked for."""


def words_of(text: str) -> list[str]:
    return [piece if index == 0 else f" {piece}" for index, piece in enumerate(text.split(" "))]


def text_of(request: dict[str, Any], prompt: str) -> str:
    form = request.get("response_format") or {}
    kind = form.get("type")
    if kind == "json_schema":
        return json.dumps(sample(form["json_schema"].get("schema", {})), ensure_ascii=False)
    template = RUSSIAN if any("а" <= letter <= "я" for letter in prompt.lower()) else ENGLISH
    if request["messages"][-1].get("role") == "tool":
        template = AFTER_A_TOOL
    text = template.format(prompt=prompt[:ECHO_CHARACTERS])
    return json.dumps({"answer": text}, ensure_ascii=False) if kind == "json_object" else text


def calls_of(request: dict[str, Any], prompt: str) -> list[tuple[str, str]]:
    """Which functions are called, and with what arguments: those that are named, by the request or in its text."""
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


def tool_deltas(generation_id: str, calls: Sequence[tuple[str, str]]) -> list[Delta]:
    deltas: list[Delta] = []
    for index, (name, arguments) in enumerate(calls):
        function = {"name": name, "arguments": ""}
        first = {"index": index, "id": f"call_{generation_id}_{index}", "type": "function", "function": function}
        deltas.append({"tool_calls": [first]})
        deltas += (
            {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]} for fragment in FRAGMENT.findall(arguments)
        )
    return deltas


def thoughts_of(request: dict[str, Any]) -> tuple[list[str], bool]:
    """The words that are thought before the answer, and whether they are told."""
    wish = request.get("reasoning") or {}
    effort = wish.get("effort") or request.get("reasoning_effort")
    is_asked = wish or effort or str(request.get("model")).endswith(":thinking")
    if not is_asked or wish.get("enabled") is False:
        return [], False
    words = words_of(" ".join([THOUGHT] * EFFORTS[effort or "medium"])) if effort != "none" else []
    return words[: wish.get("max_tokens")], not wish.get("exclude")


def thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning.text", "text": text, "format": "unknown", "index": 0}


def media_of(generation_id: str, request: dict[str, Any], model: SimulatedModel) -> Media | None:
    wanted = set(request.get("modalities") or ["text"]) - {"text"}
    if not wanted <= set(model.outputs):
        raise NoEndpoint("No endpoints found that support the requested output modalities: " + ", ".join(sorted(wanted)))
    if "image" in wanted:
        image = {"type": "image_url", "image_url": {"url": PIXEL}, "index": 0}
        return Media({"images": [image]}, images=IMAGE_TOKENS)
    if "audio" in wanted:
        return Media({"audio": {"id": f"audio_{generation_id}", "data": SILENCE, "transcript": "Hello!"}}, audio=SOUND_TOKENS)
    return None
