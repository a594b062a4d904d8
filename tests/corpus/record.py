"""Records the requests of client libraries: `python tests/corpus/record.py OUTDIR [CLIENT …]`; see README.md in this directory.

A server in the place of OpenRouter writes each request body unchanged to OUTDIR/CLIENT/CASE.json. It takes client and case from the
path, `/CLIENT/CASE/chat/completions`. `requests.json` contains, by case, the requests for clients that take OpenAI's own format.
"""

import asyncio
import contextlib
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL = "google/gemini-2.5-flash-lite"
HELLO = [{"role": "user", "content": "Hello"}]
KEY = "sk-recorded"
CONTENT = '{"name":"Paris","population":2100000}'
CONNECTION_HEADERS = {"Host", "Connection", "Content-Length", "Transfer-Encoding"}

Cases = Mapping[str, Callable[[], Any]]
"""The function that sends the request of each case, by name of the case."""


# -- the server


class Recorder(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    directory: Path
    headers_of: dict[str, dict[str, str]]  # by client; the value of a header is that of the first case that has it

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        _, client, case, *rest = self.path.split("/")
        assert rest == ["chat", "completions"], self.path
        file = self.directory / client / f"{case}.json"
        assert not file.exists(), f"{client} sent two requests in {case}"
        file.write_bytes(body)
        for name, value in self.headers.items():
            if name.title() not in CONNECTION_HEADERS:
                self.headers_of[client].setdefault(name, value.replace(KEY, "sk-..."))
        stream = bool(json.loads(body).get("stream"))
        response = streamed_completion() if stream else json.dumps(completion("message", "chat.completion")).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if stream else "application/json")
        self.send_header("Content-Length", str(len(response)))
        self.end_headers()
        self.wfile.write(response)

    def log_message(self, *_: Any) -> None:
        pass


def completion(content_field: str, kind: str) -> dict[str, Any]:
    choice = {"index": 0, content_field: {"role": "assistant", "content": CONTENT}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {"id": "gen-1", "object": kind, "created": 1, "model": MODEL, "choices": [choice], "usage": usage}


def streamed_completion() -> bytes:
    return f"data: {json.dumps(completion('delta', 'chat.completion.chunk'))}\n\ndata: [DONE]\n\n".encode()


@contextlib.contextmanager
def serving(directory: Path, clients: list[str]) -> Iterator[str]:
    Recorder.directory, Recorder.headers_of = directory, {client: {} for client in clients}
    for client in clients:
        shutil.rmtree(directory / client, ignore_errors=True)
        (directory / client).mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    for client, headers in Recorder.headers_of.items():
        (directory / client / "headers.json").write_text(json.dumps(headers, indent=2) + "\n")


# -- the requests


def requests() -> dict[str, dict[str, Any]]:
    """The members of the request of each case, in OpenAI's format."""
    cases = json.loads((HERE / "requests.json").read_text())
    cases["long"] = {"messages": [{"role": "user", "content": "Очень long text, « 😀 ». " * 700}]}
    schema: dict[str, Any] = {"type": "string"}
    for depth in range(60):
        schema = {"type": "object", "properties": {f"level_{depth}": schema}, "required": [f"level_{depth}"]}
    cases["deep-schema"] = {"tools": [{"type": "function", "function": {"name": "deep", "parameters": schema}}]}
    return {case: {"model": MODEL, "messages": HELLO, **members} for case, members in cases.items()}


def openai_python(url: str) -> Cases:
    import openai
    from pydantic import BaseModel, Field

    class City(BaseModel):
        """A city."""

        name: str = Field(description="in its own language")
        population: int | None

    def client(case: str, kind: Any = openai.OpenAI) -> Any:
        return kind(base_url=f"{url}/openai-python/{case}", api_key=KEY, max_retries=0).chat.completions

    known = inspect.signature(client("").create).parameters

    def create(case: str, members: dict[str, Any]) -> None:
        extra = {name: value for name, value in members.items() if name not in known}
        named = {name: value for name, value in members.items() if name in known}
        response = client(case).create(**named, **({"extra_body": extra} if extra else {}))
        list(response if members.get("stream") else [])

    def stream_helper() -> None:
        with client("stream-helper").stream(model=MODEL, messages=HELLO, response_format=City) as stream:
            stream.until_done()

    tool = openai.pydantic_function_tool(City)
    return {
        **{case: lambda case=case, members=members: create(case, members) for case, members in requests().items()},
        "pydantic": lambda: client("pydantic").parse(model=MODEL, messages=HELLO, response_format=City),
        "pydantic-tool": lambda: client("pydantic-tool").parse(model=MODEL, messages=HELLO, tools=[tool]),
        "stream-helper": stream_helper,
        "extra-body-on-top": lambda: client("extra-body-on-top").create(
            model=MODEL, messages=HELLO, temperature=0.5, user="ivan.petrov@example.com", extra_body={"temperature": 1.5, "usage": None}
        ),
        "extra-headers": lambda: client("extra-headers").create(
            model=MODEL, messages=HELLO, extra_headers={"HTTP-Referer": "https://example.com", "X-Title": "Ivan's"}
        ),
        "async": lambda: asyncio.run(client("async", openai.AsyncOpenAI).create(model=MODEL, messages=HELLO)),
    }  # fmt: skip


def litellm(url: str, client: str = "litellm", provider: str = "openai") -> Cases:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    def complete(case: str, members: dict[str, Any]) -> None:
        members = {**members, "model": f"{provider}/{members['model'] or MODEL}"}
        response = litellm.completion(
            **members, api_base=f"{url}/{client}/{case}", api_key=KEY, num_retries=0, max_retries=0,
            allowed_openai_params=[name for name in members if name not in ("model", "messages")],
        )  # fmt: skip
        list(response if members.get("stream") else [])

    return {case: lambda case=case, members=members: complete(case, members) for case, members in requests().items()}


def litellm_openrouter(url: str) -> Cases:
    return litellm(url, "litellm-openrouter", "openrouter")


def langchain_python(url: str) -> Cases:
    from langchain_core.messages import AIMessage, ChatMessage, FunctionMessage, HumanMessage, SystemMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    class City(BaseModel):
        """A city."""

        name: str
        population: int | None = None

    @tool
    def get_weather(city: str, unit: str = "celsius") -> str:
        """The weather of a city"""
        return city + unit

    contents = {case: members["messages"][0]["content"] for case, members in requests().items()}
    parts = {part["type"]: part for case in ("image-data", "file-data", "audio") for part in contents[case]}
    png = parts["image_url"]["image_url"]["url"].partition(",")[2]
    call = AIMessage("", tool_calls=[{"name": "get_weather", "args": {"city": "Париж", "x": 1.0}, "id": "call_1"}])
    legacy = AIMessage("", additional_kwargs={"function_call": {"name": "get_weather", "arguments": "{}"}})
    tool_result_turn = [HumanMessage("Weather?"), call, ToolMessage("21", tool_call_id="call_1")]
    conversation = [SystemMessage("Be brief."), HumanMessage("Hello", name="Ivan"), AIMessage("Hi"), HumanMessage("Again")]
    cached = SystemMessage([{"type": "text", "text": "Rules.", "cache_control": {"type": "ephemeral"}}])
    extra = {"provider": {"sort": "price"}, "usage": {"include": True}, "models": [MODEL], "transforms": [], "top_k": 1.0}
    tools: dict[str, dict[str, Any]] = {
        "tools": {}, "tools-strict": {"strict": True}, "tools-not-parallel": {"parallel_tool_calls": False},
        "tool-choice-any": {"tool_choice": "any"}, "tool-choice-named": {"tool_choice": "get_weather"},
    }  # fmt: skip
    settings: dict[str, dict[str, Any]] = {
        "plain": {}, "sampling": {"temperature": 1.0, "top_p": 1e-05, "seed": 7, "presence_penalty": 0.1 + 0.2, "n": 2},
        "stop": {"stop": "END"}, "stop-list": {"stop": ["END", "\u2028"]}, "max-tokens": {"max_tokens": 16},
        "max-completion-tokens": {"max_completion_tokens": 16}, "logprobs": {"logprobs": True, "top_logprobs": 3},
        "logit-bias": {"logit_bias": {50256: -100}}, "reasoning-effort": {"reasoning_effort": "low", "verbosity": "high"},
        "tier": {"service_tier": "flex", "store": False, "metadata": {"a": "b"}}, "extra-body": {"extra_body": extra},
        "model-kwargs": {"model_kwargs": {"user": "ivan.petrov@example.com", "prediction": {"type": "content", "content": "x"}}},
    }  # fmt: skip
    messages: dict[str, list[Any]] = {
        "conversation": conversation, "developer": [ChatMessage("Be brief.", role="developer"), HumanMessage("Hello")],
        "tool-turn": tool_result_turn, "functions": [HumanMessage("Weather?"), legacy, FunctionMessage("21", name="get_weather")],
        "image": [HumanMessage([{"type": "image", "base64": png, "mime_type": "image/png"}, {"type": "text", "text": "?"}])],
        "image-url": [HumanMessage([{"type": "image", "url": "https://example.com/a.png"}])],
        "parts": [HumanMessage([parts["text"], parts["image_url"], parts["file"], parts["input_audio"]])],
        "file": [HumanMessage([{"type": "file", "base64": png, "mime_type": "application/pdf", "filename": "отчёт.pdf"}])],
        "audio": [HumanMessage([{"type": "audio", "base64": png, "mime_type": "audio/wav"}])],
        "cache-control": [cached, HumanMessage("Hello")], "refusal": [AIMessage("", additional_kwargs={"refusal": "No."}), *conversation],
        "empty": [HumanMessage(""), AIMessage(""), HumanMessage([])],
        "unicode": [HumanMessage(contents["unicode"])],
        "escapes": [HumanMessage(contents["escapes"])],
    }  # fmt: skip

    def model(case: str, **members: Any) -> Any:
        base_url = f"{url}/langchain-python/{case}"
        return ChatOpenAI(model=MODEL, api_key=KEY, base_url=base_url, max_retries=0, use_responses_api=False, **members)

    return {
        **{case: lambda case=case, members=members: model(case, **members).invoke("Hello") for case, members in settings.items()},
        **{case: lambda case=case, given=given: model(case).invoke(given) for case, given in messages.items()},
        **{case: lambda case=case, how=how: model(case).bind_tools([get_weather, City], **how).invoke("Weather?")
           for case, how in tools.items()},
        **{f"structured-{method}": lambda method=method:
               model(f"structured-{method}").with_structured_output(City, method=method).invoke("Paris")
           for method in ("json_schema", "json_mode", "function_calling")},
        "tool-turn-with-tools": lambda: model("tool-turn-with-tools").bind_tools([get_weather]).invoke(tool_result_turn),
        "stream": lambda: list(model("stream").stream("Hello")),
        "stream-usage": lambda: list(model("stream-usage", stream_usage=True).stream("Hello")),
        "stream-without-usage": lambda: list(model("stream-without-usage", stream_usage=False).stream("Hello")),
        "streaming": lambda: model("streaming", streaming=True).invoke("Hello"),
        "async": lambda: asyncio.run(model("async").ainvoke("Hello")),
    }  # fmt: skip


PYTHON: dict[str, tuple[str, Callable[[str], Cases]]] = {
    "openai-python": ("openai", openai_python),
    "langchain-python": ("langchain_openai", langchain_python),
    "litellm": ("litellm", litellm),
    "litellm-openrouter": ("litellm", litellm_openrouter),
}
JAVASCRIPT = ["openai-node", "langchain-node", "ai-sdk-openai", "ai-sdk-openai-compatible", "ai-sdk-openrouter"]


def record(client: str, url: str, directory: Path) -> None:
    """Sends all cases of a client, and reports those it refused to send. Errors after sending (about the response) are ignored."""
    for case, send in PYTHON[client][1](url).items():
        try:
            send()
        except Exception as error:
            if not (directory / client / f"{case}.json").exists():
                print(f"{client}/{case}: not recorded: {error!r}"[:200])


def main(directory: Path, *wanted: str) -> None:
    installed = [client for client, (module, _) in PYTHON.items() if importlib.util.find_spec(module)]
    installed += JAVASCRIPT if (HERE / "node_modules").exists() else []
    for client in {*PYTHON, *JAVASCRIPT} - set(installed):
        print(f"{client}: not installed here")
    clients = [client for client in installed if not wanted or client in wanted]
    with serving(directory, clients) as url:
        for client in clients:
            if client in PYTHON:
                record(client, url, directory)
        names = [client for client in clients if client in JAVASCRIPT]
        if names:
            path = f"{HERE / 'node_modules' / '.bin'}{os.pathsep}{os.environ['PATH']}"
            environ = {**os.environ, "PATH": path, "RECORDER": url, "OUTDIR": str(directory), "KEY": KEY}
            subprocess.run(
                ["node", HERE / "record.mjs", *names], input=json.dumps(requests()), text=True, env=environ, check=True
            )
    for client in clients:
        print(f"{client}: {len(list((directory / client).iterdir())) - 1} cases")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])
