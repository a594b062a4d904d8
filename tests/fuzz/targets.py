"""The fuzz targets. Each takes any bytes, and fails if the code raises an exception that it does not declare.

A target takes its decisions from the input itself (Decisions), so that a fuzzer that changes bytes also changes decisions. Its seeds
are valid and nearly valid inputs.
"""

import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from gptutor.api.chat.request import ParsedRequest, parse_request
from gptutor.config.load import CONFIG_PATH_VARIABLE, SHORT_NAMES, load
from gptutor.config.schema import Config, ConfigError
from gptutor.errors import ApiError
from gptutor.integrations.vk import InvalidLaunch, signature, verify
from gptutor.money.amounts import AccountId
from gptutor.money.keys import KEY_PATTERN, hash_key, make_key, parse_key
from gptutor.openrouter.bill import EVENT_BYTES_MAX, BillScanner
from gptutor.openrouter.catalogue import CatalogueError, parse_models

SEPARATOR = b"\xfe\xfd"


@dataclass(frozen=True)
class Target:
    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


class Decisions:
    """The bytes after SEPARATOR, as decisions of the target. `input` is what precedes it: the input of the tested code."""

    def __init__(self, data: bytes) -> None:
        self.input, _, self._bytes = data.partition(SEPARATOR)

    def number(self, below: int) -> int:
        return int.from_bytes(self.take(2), "big") % below

    def take(self, size: int) -> bytes:
        taken, self._bytes = self._bytes[:size], self._bytes[size:]
        return taken


# -- scanner: the result does not depend on how the stream is split, and memory is bounded

EVENT = b'data: {"id":"gen-1","choices":[{"delta":{"content":"\\"usage\\""}}],"usage":{"cost":0.25,"is_byok":false}}'
STREAMS = (
    b": OPENROUTER PROCESSING\n\n" + EVENT + b"\n\ndata: [DONE]\n\n",
    EVENT.replace(b',"usage"', b'\r\ndata:,"usage"') + b"\r\n\r\ndata: [DONE]\r\n\r\n",
    EVENT + b"\r\rdata: [DONE]",
    b'data: {"error":{"code":502},"usage":{"cost":1E-3,"is_byok":true,"cost_details":{"upstream_inference_cost":0.5}}}\n\n',
    b'data: {"usage":{"cost":null}}\n\ndata: {"usage":[1]}\n\ndata: [[[[\n\ndata: {"id":5}\n\r',
)
TOO_LONG = EVENT + b"x" * 100 + b"\n\n" + EVENT + b"\n\n" + SEPARATOR + bytes([0, 0, 0, 199, 0, 3, 0, 90, 0, 95, 0, 200])


def fuzz_scanner(data: bytes) -> None:
    decisions = Decisions(data)
    known = "gen-0" if decisions.number(2) else None
    filler = b"x" * (EVENT_BYTES_MAX - 20) if decisions.number(200) == 199 else b""
    splits = [decisions.number(1 << 16) for _ in range(decisions.number(20))]
    stream = filler + decisions.input
    expected = scan_in_parts(stream, [], known)
    assert scan_in_parts(stream, [split + len(filler) for split in splits] + splits, known) == expected
    if not filler and len(stream) < 300:
        assert scan_in_parts(stream, list(range(len(stream))), known) == expected


def scan_in_parts(stream: bytes, splits: list[int], known: str | None) -> tuple[Any, ...]:
    scanner = BillScanner(known)
    edges = sorted({0, len(stream), *(split % (len(stream) + 1) for split in splits)})
    for start, end in itertools.pairwise(edges):
        scanner.feed(stream[start:end])
        assert len(scanner._partial) <= EVENT_BYTES_MAX + (end - start) + 64
    scanner.finish()
    bill = scanner.bill
    return (
        (bill.cost_usd, bill.prompt_tokens, bill.completion_tokens) if bill else None,
        scanner.generation_id,
        scanner.has_seen_end,
    )


# -- request: only ApiError is raised, and accepted bodies are forwarded unchanged except for GPTutor's own fields

BODIES = (
    b'{"messages":[{"role":"user","content":"Hi"}]}',
    b'{"messages":[{"role":"user","content":"\\ud83d \\ud83d\\ude00 \\\\ud83d"}],"stream":true,"stream_options":{"a":1E+2}}',
    b'{"messages":[{"role":"assistant","content":null,"tool_calls":[]}],"usage":{"x":[1.50]},"user":"ivan","n":2,"x":-0.0}',
    '{ "messages" : [{"role":"user","content":[{"type":"text","text":"я"},{"type":"image_url","image_url":{"url":"x"}}]}] }'.encode(),
    b'{"messages":[{"role":"user","content":"Hi"}],"model":"a/b:online","models":["c"],"max_tokens":5,"stop":["a"],"tools":[{}]}',
    b'{"messages":[{"role":"system","content":"\\u0000"}],"\\u0061":1e308,"\\"":{"":[]},"temperature":2,"max_completion_tokens":null}',
)
DUPLICATE_KEYS = (
    b'{"messages":[{"role":"user","content":"Hi"}],"max_tokens":1,"max_tokens":9}',
    b'{"messages":[{"role":"user","content":"Hi"}],"x":[{"a":1,"\\u0061":2}]}',
)
TOKENS = (
    *(b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"1e999", b"NaN", b"-0", b"9" * 500, b"[" * 2000),
    *(
        b"\\ud800",
        b"\\udc00",
        b"\\ufdd0",
        "\ufdd0".encode(),
        b"\xff",
        b"\xed\xa0\x80",
        b"\x00",
        b"\\u0000",
        b'"model":"x",',
        b'"user":1,',
    ),
    *(b'"stream":false,', b'"usage":{"include":false},', b'"max_tokens":1,', b'"\\u006dodel":"y",', b" ", b"\n", b"\xef\xbb\xbf"),
)
OWN_FIELDS = {"user", "usage", "model", "stream_options", "max_tokens"}


def fuzz_request(data: bytes) -> None:
    decisions = Decisions(data)
    body = bytearray(decisions.input)
    for _ in range(decisions.number(6)):
        index = decisions.number(len(body) + 1)
        length = decisions.number(4)
        body[index : index + length] = TOKENS[decisions.number(len(TOKENS))]
    body = body[: len(body) - decisions.number(2)]
    output_limit = decisions.number(2) * 16 or None
    with suppress(ApiError):
        parsed = parse_request(bytes(body), default_model="default/model")
        assert_forwarded_unchanged(bytes(body), parsed, output_limit)


def assert_forwarded_unchanged(body: bytes, parsed: ParsedRequest, output_limit: int | None) -> None:
    sent = parsed.upstream_body(user="0" * 32, output_limit=output_limit)
    document = strictly_parsed(sent)
    assert document["user"] == "0" * 32
    assert document["usage"]["include"] is True
    assert not parsed.stream or document["stream_options"]["include_usage"] is True
    assert output_limit is None or document["max_tokens"] == output_limit
    before, after = members(body), members(sent)
    own_fields = OWN_FIELDS if parsed.stream else OWN_FIELDS - {"stream_options"}
    own_fields = own_fields if output_limit is not None else own_fields - {"max_tokens"}
    own_fields = own_fields if strictly_parsed(body).get("model") is None else own_fields - {"model"}
    assert {name: value for name, value in after.items() if name not in own_fields} == {
        name: value for name, value in before.items() if name not in own_fields
    }
    assert [name for name in after if name in before] == list(before)  # in the same order


def strictly_parsed(document: bytes) -> Any:
    """Parses with the standard library, and asserts that no object has a duplicate key."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "duplicate key"
        return dict(pairs)

    return json.loads(document, object_pairs_hook=unique)


SPACE = re.compile(r"[ \t\n\r]*")
decode_value = json.JSONDecoder().raw_decode


def members(document: bytes) -> dict[str, str]:
    """The members of a JSON object: name → text of its value."""
    return dict(_members(document.decode()))


def _members(text: str) -> Iterator[tuple[str, str]]:
    index = after_space(text, text.index("{") + 1)
    while text[index] != "}":
        name, index = decode_value(text, index)
        start = after_space(text, after_space(text, index) + 1)
        _, end = decode_value(text, start)
        yield name, text[start:end]
        index = after_space(text, end)
        if text[index] == ",":
            index = after_space(text, index + 1)


def after_space(text: str, index: int) -> int:
    return SPACE.match(text, index).end()  # type: ignore[union-attr]


# -- key: no exception, and only one form of each key is accepted

KEYS = tuple(make_key(AccountId(number)).encode() for number in (1, 17, 2**63 - 1))


def fuzz_key(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    claim = parse_key(text)
    if claim is not None:
        match = KEY_PATTERN.fullmatch(text)
        assert match is not None
        assert claim.account_id == int(match[1]) < 2**63
        assert claim.key_hash == hash_key(text)


# -- vk: only InvalidLaunch is raised, and nothing is accepted without a valid signature

VK_SECRET = "wvl68m4dR1UpLrVRli"
VK_NOW = 1_795_500_000
VK_SIGNED = {"vk_user_id": "494075", "vk_app_id": "5", "vk_ts": str(VK_NOW), "vk_access_token_settings": "", "vk_ref": "a,b"}
VK_LAUNCH = urlencode({**VK_SIGNED, "sign": signature(VK_SIGNED, VK_SECRET)})
LAUNCHES = (VK_LAUNCH.encode(), b"https://h/?" + VK_LAUNCH.encode() + b"#x", b"sign=&vk_user_id=1", b"vk_ts=%F0%9F%92%A9&a&b=c")


def fuzz_vk(data: bytes) -> None:
    with suppress(InvalidLaunch):
        launch = verify(data.decode("latin-1"), app_id=5, secret=VK_SECRET, now=VK_NOW, age_s_max=3600)
        assert launch.user_id == 494075
        assert launch.parameters == VK_SIGNED  # only this launch is signed


# -- config: only ConfigError is raised

FILES = (
    b"",
    b"server:\n  port: 3001\n  host: 0.0.0.0\nbilling:\n  rub_per_usd: 92.5\n",
    b"logs: {level: debug, stdout: no, retention_days: 1}\ndatabase:\n  url: postgresql://u:p@h/n\n",
    b"a: &a [*a]\n? {b: c}\n: d\n",
    b"server:\n  - port\n--- \n!!python/object/apply:os.system [x]\n",
)
VALUES = (
    *(
        "",
        "0",
        "-1",
        "1e999",
        "NaN",
        "Infinity",
        "1_0",
        "true",
        "\u0661",
        "9" * 400,
        "x" * 9,
        "http://h",
        "http://u:p@h:99999/",
        "*",
        "{}",
    ),
    *("[]", "null", "https://a, https://b", "\ud800", "0x10", " 5 ", "5s", "1e2", "https://[::1", "http://\u0430", "sk-or"),
)
NAMES = tuple(
    sorted(
        {
            *SHORT_NAMES,
            "HTTPS_PROXY",
            "NO_PROXY",
            "GPTUTOR_X",
            "GPTUTOR___",
            "GPTUTOR_SERVER__",
            "GPTUTOR_SERVER__NOPE",
            "GPTUTOR_NOPE__PORT",
            *(
                f"GPTUTOR_{section}__{setting}".upper()
                for section, value in ((name, getattr(Config(), name)) for name in Config.__struct_fields__)
                for setting in value.__struct_fields__
            ),
        }
    )
)


def fuzz_config(data: bytes) -> None:
    decisions = Decisions(data)
    environ = {}
    for _ in range(decisions.number(4)):
        name = NAMES[decisions.number(len(NAMES))]
        chosen = decisions.number(2 * len(VALUES))
        value = (
            VALUES[chosen]
            if chosen < len(VALUES)
            else decisions.take(decisions.number(64)).decode("utf-8", "surrogateescape").replace("\0", "")
        )
        environ[name] = value
    with tempfile.NamedTemporaryFile(prefix="gptutor-fuzz-") as file, suppress(ConfigError):
        file.write(decisions.input)
        file.flush()
        loaded = load({**environ, CONFIG_PATH_VARIABLE: file.name})
        assert isinstance(loaded, Config)


# -- models: only CatalogueError is raised, and all prices are finite and within bounds

LISTS = (
    b'{"data":[{"id":"a/b","pricing":{"prompt":"0.0000001","completion":"0.0000004"},"context_length":1000}]}',
    b'{"data":[{"id":"a/b","pricing":{"prompt":"-1","completion":"1e-9","image":0.1,"request":"NaN"},"top_provider":{"max_completion_tokens":5}}]}',
    b'{"data":[{"id":"a/b","pricing":{"prompt":"0","completion":"0","internal_reasoning":"1"},"top_provider":null},{},5,null]}',
    b'{"data":{}}',
)
NUMBERS = (
    b'"Infinity"',
    b'"sNaN"',
    b'"1e999999999"',
    b'"1E-999999999"',
    b"null",
    b'"_1"',
    '"\u0661"'.encode(),
    b'"-0"',
    b"1e308",
    b'" 1 "',
    b'"1001"',
)


def fuzz_models(data: bytes) -> None:
    decisions = Decisions(data)
    document = decisions.input
    for _ in range(decisions.number(3)):
        spans = [match.span() for match in re.finditer(rb'"[0-9][^"]*"|\b[0-9][0-9.]*', document)] or [(0, 0)]
        start, end = spans[decisions.number(len(spans))]
        document = document[:start] + NUMBERS[decisions.number(len(NUMBERS))] + document[end:]
    with suppress(CatalogueError):
        for model in parse_models(document):
            for usd in model.pricing.values():
                assert usd.is_finite()
                assert 0 <= usd <= 1000
                assert len(str(usd)) < 100


def with_decisions(*inputs: bytes) -> tuple[bytes, ...]:
    """Each seed without decisions, and with some."""
    return tuple(seed + SEPARATOR + decisions for seed in inputs for decisions in (b"", bytes(range(1, 65))))


TARGETS = {
    "scanner": Target(fuzz_scanner, (*with_decisions(*STREAMS), TOO_LONG)),
    "request": Target(fuzz_request, with_decisions(*BODIES, *DUPLICATE_KEYS)),
    "key": Target(fuzz_key, KEYS),
    "vk": Target(fuzz_vk, LAUNCHES),
    "config": Target(fuzz_config, with_decisions(*FILES)),
    "models": Target(fuzz_models, with_decisions(*LISTS)),
}
