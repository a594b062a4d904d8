"""The validation of the request body (contract A1, A4, A5, B2; rows input-1 to -6, -11, -13, -14, -16, -17)."""

import json
import time
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptutor.api.chat.request import ParsedRequest, parse_request
from gptutor.errors import ApiError
from gptutor.money.pricing import PriceCap

MESSAGES = [{"role": "user", "content": "Привет"}]


def parsed(**members: Any) -> ParsedRequest:
    return parse_request(json.dumps({"messages": MESSAGES, **members}).encode(), default_model="default/model")


def error_of(body: bytes) -> tuple[int, str, str]:
    with pytest.raises(ApiError) as caught:
        parse_request(body, default_model="default/model")
    return caught.value.status, caught.value.code, caught.value.text


@pytest.mark.parametrize("body", [b"{}", b'{"messages": null}', b'{"messages": "hi"}', b'{"messages": {}}', b'{"messages": []}'])
def test_messages_are_required_with_the_exact_error_text(body: bytes) -> None:
    assert error_of(body) == (400, "invalid_request", "messages array is required")


@pytest.mark.parametrize(
    ("member", "text"),
    [
        ('"temperature": 2.1', "temperature must be a number from 0 to 2"),
        ('"temperature": -0.1', "temperature must be a number from 0 to 2"),
        ('"temperature": "1"', "temperature must be a number from 0 to 2"),
        ('"temperature": true', "temperature must be a number from 0 to 2"),
        ('"top_p": 1.01', "top_p must be a number from 0 to 1"),
        ('"frequency_penalty": -2.5', "frequency_penalty must be a number from -2 to 2"),
        ('"presence_penalty": [1]', "presence_penalty must be a number from -2 to 2"),
        ('"max_tokens": 0', "max_tokens must be an integer from 1 to 2147483647"),
        ('"max_tokens": -1', "max_tokens must be an integer from 1 to 2147483647"),
        ('"max_tokens": 1.5', "max_tokens must be an integer from 1 to 2147483647"),
        ('"max_tokens": "9"', "max_tokens must be an integer from 1 to 2147483647"),
        ('"max_tokens": 9223372036854775808', "max_tokens must be an integer from 1 to 2147483647"),
        ('"max_completion_tokens": 0', "max_completion_tokens must be an integer from 1 to 2147483647"),
        ('"max_tokens": 2147483648', "max_tokens must be an integer from 1 to 2147483647"),
        ('"max_tokens": 1e10', "max_tokens must be an integer from 1 to 2147483647"),
        ('"max_tokens": 1e-999', "max_tokens must be an integer from 1 to 2147483647"),
        ('"n": 129.0', "n must be an integer from 1 to 128"),
        ('"stop": [1]', "stop[0] must be a string"),
        ('"stop": 5', "stop must be a string or an array of at most 16 strings"),
        ('"stream": "true"', "stream must be a boolean"),
        ('"stream": 1', "stream must be a boolean"),
        ('"n": 0', "n must be an integer from 1 to 128"),
        ('"n": 129', "n must be an integer from 1 to 128"),
        ('"model": 5', "model must be a string of 1 to 200 printable characters"),
        ('"model": "a\\u0000b"', "model must be a string of 1 to 200 printable characters"),
        ('"model": ""', "model must be a string of 1 to 200 printable characters"),
        ('"models": "a"', "models must be an array of at most 10 strings"),
        ('"stream_options": []', "stream_options must be an object"),
        ('"models": [5]', "models[0] must be a string"),
        ('"tools": {}', "tools must be an array of objects"),
        ('"tools": ["a"]', "tools[0] must be an object"),
        ('"plugins": [{}, 1]', "plugins[1] must be an object"),
        ('"web_search_options": true', "web_search_options must be an object"),
        ('"modalities": [null]', "modalities[0] must be a string"),
        ('"service_tier": 1', "service_tier must be a string"),
        ('"provider": []', "provider must be an object"),
        ('"preset": {}', "preset must be a string"),
        ('"reasoning": true', "reasoning must be an object"),
        ('"prediction": "x"', "prediction must be an object"),
        ('"stop_server_tools_when": {}', "stop_server_tools_when must be an array of objects"),
        ('"stop_server_tools_when": [1]', "stop_server_tools_when[0] must be an object"),
        ('"max_tool_calls": 0', "max_tool_calls must be a positive integer"),
    ],
)
def test_an_error_names_the_field_and_what_is_allowed(member: str, text: str) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], %s}' % member.encode()
    assert error_of(body) == (400, "invalid_request", text)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ('[{"role": "user", "content": 5}]', "messages[0].content must be a string or an array of parts"),
        ('[{"role": "user", "content": null}]', "messages[0].content must be a string or an array of parts"),
        ('[{"role": "user"}]', "messages[0].content must be a string or an array of parts"),
        ('[{"role": "user", "content": "a"}, {"role": "user", "content": {}}]',
         "messages[1].content must be a string or an array of parts"),
        ('[{"role": "user", "content": ["a"]}]', "messages[0].content[0] must be an object with a string `type`"),
        ('[{"role": "user", "content": [{"text": "a"}]}]', "messages[0].content[0] must be an object with a string `type`"),
        ('[{"role": "robot", "content": "a"}]',
         "messages[0].role must be one of system, user, assistant, developer, tool, function"),
        ('[{"content": "a"}]', "messages[0].role must be one of system, user, assistant, developer, tool, function"),
        ('["a"]', "messages[0] must be an object with a role"),
    ],
)  # fmt: skip
def test_an_invalid_message_is_named_by_its_path(messages: str, text: str) -> None:
    assert error_of(b'{"messages": %s}' % messages.encode()) == (400, "invalid_request", text)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b'{"messages": [',
        b'{"messages": [{"role": "user", "content": "x"}], "x": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "x": Infinity}',
        b'{"messages": [{"role": "user", "content": "x"}], "x": %s}' % (b"[" * 100_000),
        b'{"messages": [{"role": "user", "content": "x"}], "x": %s}' % (b"[" * 100_000 + b"]" * 100_000),
        b'{"messages": [{"role": "user", "content": "x"}], "x": %s0%s}' % (b'{"a":' * 100_000, b"}" * 100_000),
        b'{"messages": [{"role": "user", "content": "x\ny"}]}',
        b'{"messages": [{"role": "user", "content": "x"}]} {}',
    ],
)
def test_a_body_that_is_not_json_has_an_error_of_its_own(body: bytes) -> None:
    assert error_of(body) == (400, "invalid_json", "Request body is not valid JSON")


@pytest.mark.parametrize(
    "body",
    [
        '{"messages": [{"role": "user", "content": "Привет"}]}'.encode("cp1251"),
        '{"messages": [{"role": "user", "content": "Привет"}]}'.encode("cp866"),
        '{"messages": [{"role": "user", "content": "x"}]}'.encode("utf-16"),
        b'{"messages": [{"role": "user", "content": "x"}], "x": "\xff"}',
        b'{"messages": [{"role": "user", "content": "\xc3("}]}',
        b'\xff{"messages": [',
    ],
)
def test_a_body_in_another_encoding_is_told_so(body: bytes) -> None:
    assert error_of(body) == (400, "invalid_json", "Request body must be in UTF-8")


def test_a_byte_order_mark_is_skipped() -> None:
    body = b'{"messages":[{"role":"user","content":"x"}]}'
    read = parse_request(b"\xef\xbb\xbf" + body, default_model="m")
    assert read == parse_request(body, default_model="m")
    assert error_of(b"\xef\xbb\xbf") == (400, "invalid_json", "Request body is not valid JSON")


@pytest.mark.parametrize(
    ("text", "number"), [("5.0", 5), ("1e3", 1000), ("1E+3", 1000), ("0.5e1", 5), ("2147483647.0", 2**31 - 1)]
)
def test_an_integer_may_be_written_with_a_point_or_an_exponent(text: str, number: int) -> None:
    body = b'{"messages":[{"role":"user","content":"x"}],"max_tokens":%s}' % text.encode()
    read = parse_request(body, default_model="m")
    assert read.size.output_tokens == number
    assert type(read.size.output_tokens) is int
    assert read.upstream_body(user="u", output_limit=None).startswith(body[:-1])  # as it was written
    assert json.loads(read.upstream_body(user="u", output_limit=4))["max_tokens"] == 4
    assert parsed(n=3.0, max_completion_tokens=7.0).size.choices == 3


@pytest.mark.parametrize("body", [b"[]", b"null", b'"x"', b"5"])
def test_json_that_is_not_an_object_is_rejected(body: bytes) -> None:
    assert error_of(body) == (400, "invalid_request", "Request body must be a JSON object")


def test_a_huge_integer_is_rejected() -> None:
    digits = b"9" * 1_000_000
    body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": %s}' % digits
    assert error_of(body) == (400, "invalid_request", "Numbers must be finite, and at most 400 characters long")


@pytest.mark.parametrize("number", ["1e999", "-1E+999", "9" * 401, "0." + "1" * 400, '[[{"a": 1e309}]]'])
def test_a_number_that_two_parsers_may_read_differently_is_rejected(number: str) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "x_new": %s}' % number.encode()
    assert error_of(body) == (400, "invalid_request", "Numbers must be finite, and at most 400 characters long")


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ('{"messages": [{"role": "user", "content": "x"}], "model": "a", "model": "b"}', "model"),
        ('{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "max_t\\u006fkens": 9}', "max_tokens"),
        ('{"messages": [{"role": "user", "content": "x", "content": []}]}', "content"),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "", "type": "file"}]}]}', "type"),
        ('{"messages": [{"role": "user", "content": "x"}], "x_new": [{"a": {"b": 1, "b": 1}}]}', "b"),
    ],
)
def test_a_duplicate_field_is_rejected(body: str, name: str) -> None:
    assert error_of(body.encode()) == (400, "duplicate_field", f"The field '{name}' is duplicated in one object")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "developer", "content": "Be brief"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": []},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
        {"role": "function", "name": "f", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "https://x"}}]},
    ],
)  # fmt: skip
def test_every_message_format_of_the_sdks_is_accepted(message: dict[str, Any]) -> None:
    assert parsed(messages=[message]).message_count == 1


def test_null_counts_as_absent() -> None:
    names = ("model", "stream", "temperature", "top_p", "max_tokens", "stop", "n", "usage", "stream_options", "user")
    read = parsed(**dict.fromkeys(names))
    assert (read.model, read.stream, read.size.output_tokens, read.size.choices) == ("default/model", False, None, 1)
    assert json.loads(read.upstream_body(user="u", output_limit=20))["max_tokens"] == 20


def test_the_size_has_what_the_price_depends_on() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1000}}
    body = json.dumps(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, image]}], "n": 3, "max_tokens": 5}
    )
    size = parse_request(body.encode(), default_model="m").size
    assert (size.images, size.has_files, size.choices, size.output_tokens) == (1, False, 3, 5)
    assert 50 < size.prompt_bytes < 100  # the text, but not the image's thousand bytes
    assert parsed(max_tokens=5, max_completion_tokens=9).size.output_tokens == 9
    assert parsed(model="a/b", models=["c/d", "e/f"]).fallbacks == ("c/d", "e/f")


@pytest.mark.parametrize(
    ("members", "paid"),
    [
        ({}, 0),
        ({"tools": [{"type": "function", "function": {"name": "f"}}, {"function": {"name": "g"}}, {"type": "custom"}]}, 0),
        ({"tools": [{"type": "openrouter:web_search"}, {"type": 5}], "plugins": [{"id": "web"}]}, 1),
        ({"plugins": [{"id": "file-parser"}, {"id": "response-healing"}]}, 0),
        ({"plugins": [{"id": "something-new"}, {}, {"id": 5}]}, 3),
        ({"plugins": [{"id": "web", "max_results": 50}]}, 11),
        ({"plugins": [{"id": "web", "max_results": 50.0}]}, 11),
        ({"plugins": [{"id": "web", "max_results": -1e300}]}, 1),
        ({"plugins": [{"id": "web", "max_results": 1e300}]}, 201),
        ({"plugins": [{"id": "web", "max_results": "50"}]}, 1),
        ({"web_search_options": {}}, 1),
        ({"model": "a/b:online"}, 1),
        ({"models": ["a/b", "c/d:online"]}, 1),
    ],
)
def test_separately_priced_tools_are_counted(members: dict[str, Any], paid: int) -> None:
    assert parsed(**members).size.paid_tools == paid


@pytest.mark.parametrize(
    ("kinds", "count"),
    [
        (["function", "custom", "namespace", "computer_20250124", "bash_20250124", "text_editor_20250728"], 0),
        (["openrouter:web_search", 5, None, "web_search_20250305", "something_new"], 5),
    ],
)
def test_tools_that_the_client_does_not_run_are_counted(kinds: list[Any], count: int) -> None:
    assert parsed(tools=[{"type": kind} for kind in kinds]).size.server_tools == count


@pytest.mark.parametrize(("parameters", "count"), [({"max_results": 50}, 11), ({"max_results": 4.5}, 2), (5, 1), ({}, 1)])
def test_a_server_tool_counts_by_its_results(parameters: Any, count: int) -> None:
    tools = [{"type": "openrouter:web_search", "parameters": parameters}]
    assert parsed(tools=tools).size.server_tools == count


@pytest.mark.parametrize(
    ("members", "steps"),
    [
        ({}, None),
        ({"max_tool_calls": 3}, 3),
        ({"max_tool_calls": 3, "stop_server_tools_when": [{"type": "max_cost", "max_cost_in_dollars": 1}]}, None),
        ({"stop_server_tools_when": [{"type": "step_count_is", "step_count": 7}, {"type": "step_count_is", "step_count": 2}]}, 2),
        ({"stop_server_tools_when": [{"type": "step_count_is", "step_count": 0}]}, 1),
        ({"stop_server_tools_when": [{"type": "step_count_is", "step_count": 1e300}]}, 1000),
        ({"stop_server_tools_when": [{"type": "step_count_is", "step_count": "x"}]}, 1),
        ({"stop_server_tools_when": [{"type": 5}]}, None),
    ],
)
def test_the_clients_own_limit_of_tool_steps_is_read(members: dict[str, Any], steps: int | None) -> None:
    assert parsed(**members).size.tool_steps == steps


@pytest.mark.parametrize(
    ("plugins", "paid"),
    [
        (None, None),
        ([{"id": "web"}], None),
        ([{"id": "file-parser"}], None),
        ([{"id": "file-parser", "pdf": {"engine": "native"}}], None),
        ([{"id": "file-parser", "pdf": {"engine": None}}], None),
        ([{"id": "file-parser", "pdf": 5}], None),
        ([{"id": "file-parser", "pdf": {"engine": "pdf-text"}}], False),
        ([{"id": "file-parser", "pdf": {"engine": "cloudflare-ai"}}, {"id": "file-parser", "pdf": {"engine": "x"}}], True),
        ([{"id": "file-parser", "pdf": {"engine": "mistral-ocr"}}], True),
    ],
)
def test_ocr_is_paid_where_its_engine_is(plugins: Any, paid: bool | None) -> None:
    content = [{"type": "file"}, {"type": "file"}, {"type": "input_audio"}, {"type": "text"}]
    size = parsed(messages=[{"role": "user", "content": content}], plugins=plugins).size
    assert (size.documents, size.has_files, size.has_paid_ocr) == (2, True, paid)


@pytest.mark.parametrize(
    ("members", "chosen"),
    [
        ({}, False),
        ({"model": "a/b:free"}, False),
        ({"models": ["a/b:online", "a/b:floor", "a/b:thinking"]}, False),
        ({"model": "a/b:nitro"}, True),
        ({"models": ["a/b", "a/b:online:nitro"]}, True),
        ({"provider": None}, False),
        ({"provider": {"order": None, "max_price": {"prompt": 1}, "allow_fallbacks": False}}, False),
        ({"provider": {"sort": "price"}}, False),
        ({"provider": {"order": ["azure"]}}, True),
        ({"provider": {"ignore": ["azure"]}}, True),
        ({"provider": {"sort": "throughput"}}, True),
        ({"provider": {"something_new": 0}}, True),
        ({"preset": "mine"}, True),
    ],
)
def test_the_choice_of_a_provider_is_detected(members: dict[str, Any], chosen: bool) -> None:
    assert parsed(**members).size.chooses_provider is chosen


def test_what_is_billed_beside_the_output_is_measured() -> None:
    size = parsed(reasoning={"max_tokens": 500}, prediction={"type": "content", "content": "x" * 100}, plugins=[{"id": "x"}]).size
    assert (size.reasoning_tokens, size.has_unlisted_prices) == (500, True)
    assert 100 < size.prediction_bytes < 150
    plain = parsed(reasoning={"effort": "high"}, plugins=[{"id": "web"}, {"id": "moderation"}]).size
    assert (plain.reasoning_tokens, plain.prediction_bytes, plain.has_unlisted_prices) == (0, 0, False)
    assert parsed(reasoning={"max_tokens": "many"}).size.reasoning_tokens == 0
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert parsed(tools=tools).size.prompt_bytes > parsed(other=tools).size.prompt_bytes + 400


CAP = PriceCap(Decimal("0.0000015"), Decimal("0.00001"), Decimal(0))


@pytest.mark.parametrize(
    ("provider", "sent"),
    [
        ("", b'{"max_price":{"prompt":1.5,"completion":10,"request":0}}'),
        ('"provider": null,', b'{"max_price":{"prompt":1.5,"completion":10,"request":0}}'),
        (
            '"provider": {"sort" : "price", "max_price": {"completion": 9.90, "image" : 1e0, "prompt": 2}, "order":["a" ]},',
            b'{"sort":"price","max_price":{"completion":9.90,"image":1e0,"prompt":1.5,"request":0},"order":["a" ]}',
        ),
        (
            '"provider": {"max_price": {"completion": "11", "prompt": "1.5", "request": "NaN"}},',
            b'{"max_price":{"completion":10,"prompt":"1.5","request":0}}',
        ),
        ('"provider": {"max_price": [-1]},', b'{"max_price":{"prompt":1.5,"completion":10,"request":0}}'),
        (
            '"provider": {"max_price": {"completion": -1, "prompt": null}},',
            b'{"max_price":{"completion":10,"prompt":1.5,"request":0}}',
        ),
    ],
)
def test_a_price_cap_is_added_or_lowered_and_all_else_stays(provider: str, sent: bytes) -> None:
    body = b'{%s "messages":[{"role":"user","content":"x"}],"x":[1.50 ]}' % provider.encode()
    read = parse_request(body, default_model="m")
    with_cap = read.upstream_body(user="u", output_limit=None, price_cap=CAP)
    assert json.loads(with_cap)["provider"] == json.loads(sent)
    assert sent in with_cap
    assert with_cap.replace(b'"provider":' + sent, b"").replace(b",,", b",").replace(b"{,", b"{").replace(b",}", b"}") == (
        b'{"messages":[{"role":"user","content":"x"}],"x":[1.50 ],"user":"u","usage":{"include":true},"model":"m"}'
    )


def test_the_limit_of_tool_steps_is_one_more_condition() -> None:
    limit = b'{"type":"step_count_is","step_count":4}'
    assert b'"stop_server_tools_when":[%b]' % limit in parsed().upstream_body(user="u", output_limit=None, tool_steps=4)
    body = (
        b'{"messages":[{"role":"user","content":"x"}],"stop_server_tools_when":[ {"type": "max_cost","max_cost_in_dollars":1.0}]}'
    )
    sent = parse_request(body, default_model="m").upstream_body(user="u", output_limit=None, tool_steps=4)
    assert b'"stop_server_tools_when":[{"type": "max_cost","max_cost_in_dollars":1.0},%b]' % limit in sent


def test_what_makes_tokens_more_expensive_is_detected() -> None:
    cached = [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}]
    assert parsed(messages=cached).size.writes_prompt_cache
    hidden = b'{"messages":[{"role":"user","content":[{"type":"text","text":"x","cache\\u005fcontrol":{}}]}]}'
    assert parse_request(hidden, default_model="m").size.writes_prompt_cache
    assert parsed(modalities=["text", "audio"]).size.multimodal_output
    assert parsed(service_tier="priority").size.priority_tier
    plain = parsed(modalities=["text"], service_tier="flex").size
    assert (plain.writes_prompt_cache, plain.multimodal_output, plain.priority_tier) == (False, False, False)


@pytest.mark.parametrize("kind", ["file", "input_audio", "video_url", "something_new"])
def test_a_part_that_is_neither_text_nor_image_is_a_file(kind: str) -> None:
    assert parsed(messages=[{"role": "user", "content": [{"type": kind, kind: {"data": "x"}}]}]).size.has_files


def test_lone_surrogates_do_not_make_a_request_smaller() -> None:
    image = r'{"type":"image_url","image_url":{"url":"%s"}}' % (r"\ud83d" * 1000)
    body = b'{"messages":[{"role":"user","content":[{"type":"text","text":"%s"},%s]}]}' % (b"x" * 5000, image.encode())
    assert parse_request(body, default_model="m").size.prompt_bytes > 5000


def test_the_clients_members_reach_upstream_byte_for_byte() -> None:
    body = (
        b'{ "temperature" : 1.0, "seed":1e2,"x-future": {"a" : [1.50, -0, 1E+2, 123456789012345678901234567890] , "b":2},\n'
        b'"messages":[{"role":"user","content":"\\ud800 \\u0000 \xd0\x9f","extra":0.10}],"logit_bias":{"50256":-100.0}, "stream":false}'
    )
    sent = parse_request(body, default_model="d/m").upstream_body(user="pseudonym", output_limit=None)
    assert sent == (
        b'{"temperature":1.0,"seed":1e2,"x-future":{"a" : [1.50, -0, 1E+2, 123456789012345678901234567890] , "b":2},'
        b'"messages":[{"role":"user","content":"\\ud800 \\u0000 \xd0\x9f","extra":0.10}],"logit_bias":{"50256":-100.0},"stream":false,'
        b'"user":"pseudonym","usage":{"include":true},"model":"d/m"}'
    )


@pytest.mark.parametrize("escape", [r"\ud83d", r"\uDE00", r"x\ud83d\ud83d\ude00", r"\\ud83d\ud83d", r"\udc00\ud800", r"\"\ud800"])
def test_a_lone_surrogate_passes_unchanged(escape: str) -> None:
    body = b'{"messages":[{"role":"user","content":"%s"}],"stop":"\\n"}' % escape.encode()
    sent = parse_request(body, default_model="m").upstream_body(user="u", output_limit=None)
    assert sent.startswith(body[:-1])


def test_member_names_with_a_lone_surrogate_pass_unchanged() -> None:
    body = rb'{"\ud83dkey":1,"messages":[{"role":"user","content":"x"}]}'
    assert parse_request(body, default_model="m").upstream_body(user="u", output_limit=None).startswith(body[:-1])


@pytest.mark.parametrize(
    "content", [rb'"\ufdd0 \ud83d"', rb'"\uFDD0\ud83d"', '"\ufdd0 \\ud83d"'.encode(), rb'"\\ufdd0ud83d\ud83d"']
)
def test_a_lone_surrogate_beside_a_noncharacter_passes_unchanged(content: bytes) -> None:
    body = rb'{"\ud83d":1,"messages":[{"role":"user","content":%s}]}' % content
    assert parse_request(body, default_model="m").upstream_body(user="u", output_limit=None).startswith(body[:-1])


def test_a_lone_surrogate_beside_all_noncharacters_is_rejected() -> None:
    text = "".join(map(chr, range(0xFDD0, 0xFDF0))).encode()
    body = rb'{"messages":[{"role":"user","content":"%s\ud83d"}]}' % text
    assert error_of(body)[1] == "invalid_json"


def test_our_members_replace_the_clients() -> None:
    read = parsed(user="ivan@example.org", usage={"include": False, "x": 1.50}, model="a/b", stream=True, stream_options={"y": 2})
    sent = json.loads(read.upstream_body(user="pseudonym", output_limit=64))
    assert sent == {
        "messages": MESSAGES,
        "user": "pseudonym",
        "usage": {"include": True, "x": 1.5},
        "model": "a/b",
        "stream": True,
        "stream_options": {"y": 2, "include_usage": True},
        "max_tokens": 64,
    }
    assert list(sent)[:4] == ["messages", "user", "usage", "model"]  # the order is kept


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(min_size=1, max_size=8).map(lambda name: "x_" + name), json_values, max_size=5))
def test_unknown_members_arrive_unchanged_and_in_order(members: dict[str, Any]) -> None:
    sent = json.loads(parsed(**members).upstream_body(user="u", output_limit=None))
    assert list(sent)[1 : 1 + len(members)] == list(members)
    assert {name: sent[name] for name in members} == members


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_an_api_error(body: bytes) -> None:
    with pytest.raises(ApiError):
        parse_request(body, default_model="m")


def test_many_fields_with_the_last_one_duplicated_are_checked_quickly() -> None:
    """A tenth of a megabyte took seconds when each field was searched for among all."""
    keys = b",".join(b'"%d":1' % number for number in range(50_000))
    body = b'{"messages":[{"role":"user","content":"x"}],"x":{%s,"49999":2}}' % keys
    began = time.process_time()
    assert error_of(body) == (400, "duplicate_field", "The field '49999' is duplicated in one object")
    assert time.process_time() - began < 2


def test_a_body_of_brackets_alone_is_rejected() -> None:
    body = b'{"messages":[{"role":"user","content":"x"}],"x":[%s]}' % (b"[]," * 1_000_001)[:-1]
    assert error_of(body)[2] == "Request body must not have more than 1000000 objects and arrays"
