"""Which client gets which form of an error (contract B1)."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from multidict import CIMultiDict

from gptutor.errors import ERRORS, ApiError
from gptutor.http.error_form import NUMBER_CODE_SDKS, WORD_CODE_SDKS, ErrorForm, error_document
from gptutor.web import openapi, page
from tests.support.gateway import Gateway

REFUSED = ApiError("invalid_request", "temperature must be a number from 0 to 2")
TEXT = {"error": "temperature must be a number from 0 to 2"}
OBJECT = {
    "error": {
        "message": "temperature must be a number from 0 to 2",
        "type": "invalid_request_error",
        "code": "invalid_request",
        "param": None,
    }
}
OBJECT_WITH_STATUS = {"error": {**OBJECT["error"], "code": 400}}


@pytest.mark.parametrize(
    ("form", "headers", "document"),
    [
        ("auto", {}, TEXT),
        ("auto", {"User-Agent": "curl/8.5.0"}, TEXT),
        ("auto", {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64) Firefox/146.0"}, TEXT),
        ("auto", {"User-Agent": "python-requests/2.32"}, TEXT),
        ("auto", {"User-Agent": "Mozilla/5.0 (compatible; GPTBot/1.3; +https://openai.com/gptbot)"}, TEXT),
        ("auto", {"User-Agent": "OpenAI/Python 3.57.0"}, OBJECT),
        ("auto", {"User-Agent": "AsyncOpenAI/Python 3.57.0"}, OBJECT),
        ("auto", {"User-Agent": "OpenAI/JS 7.59.0"}, OBJECT),
        ("auto", {"User-Agent": "Mozilla/5.0", "x-stainless-lang": "js"}, OBJECT),
        ("auto", {"User-Agent": "ai/7.0.173 ai-sdk-provider-utils/5.0.81 node.js/v22.1.0"}, OBJECT),
        ("auto", {"User-Agent": "ai/7.0.173 ai-sdk/provider-utils/5.0.42 runtime/node.js/v22.1.0"}, OBJECT),
        ("auto", {"User-Agent": "litellm/1.110.2"}, OBJECT),
        ("auto", {"User-Agent": "speakeasy-sdk/python 0.11.46 2.914.0 1.0.0 openrouter"}, OBJECT_WITH_STATUS),
        ("auto", {"User-Agent": "speakeasy-sdk/typescript 1.3.19 2.914.0 1.0.0 @openrouter/sdk"}, OBJECT_WITH_STATUS),
        ("text", {"User-Agent": "OpenAI/Python 3.57.0", "X-Stainless-Lang": "python"}, TEXT),
        ("object", {}, OBJECT),
        ("object", {"User-Agent": "speakeasy-sdk/typescript 1.3.19 2.914.0 1.0.0 @openrouter/sdk"}, OBJECT_WITH_STATUS),
    ],
)
def test_an_sdk_gets_an_object_and_everybody_else_the_text(form: ErrorForm, headers: dict[str, str], document: Any) -> None:
    assert error_document(REFUSED, form, CIMultiDict(headers)) == document


@pytest.mark.parametrize("code", ERRORS)
def test_an_object_has_the_text_and_the_type_that_openai_names(code: str) -> None:
    error = ApiError(code)
    told = error_document(error, "object", {})["error"]
    assert told["message"].startswith(error.text)
    assert told["param"] is None
    assert told["code"] == (402 if error.status == 402 else code)
    types = {401: "authentication_error", 402: "insufficient_quota", 403: "permission_error", 429: "rate_limit_error"}
    others = "server_error" if error.status >= 500 else "invalid_request_error"
    assert told["type"] == types.get(error.status, others)


def test_the_fields_of_a_rate_limit_stay_beside_the_object() -> None:
    error = ApiError("rate_limited", extra={"message": "Try again in 7 s.", "retryAfter": 7})
    document = error_document(error, "object", {})
    assert document == {"error": document["error"], "message": "Try again in 7 s.", "retryAfter": 7}
    assert document["error"]["message"] == "Too Many Requests"


@pytest.mark.parametrize("headers", [{}, {"User-Agent": "OpenAI/Python 3.57.0"}, {"User-Agent": "@openrouter/sdk"}])
def test_the_description_has_all_forms(headers: dict[str, str]) -> None:
    described = {"$ref": "#/components/schemas/Error", "components": openapi.describe()["components"]}
    for code in ERRORS:
        Draft202012Validator(described).validate(error_document(ApiError(code), "auto", headers))


def test_the_pages_name_the_sdks() -> None:
    texts = [(page.HERE / "pages" / f"errors.{language}.md").read_text(encoding="utf-8") for language in page.LANGUAGES]
    for text in (*texts, openapi.SOURCE.read_text(encoding="utf-8")):
        assert [part for part in (*NUMBER_CODE_SDKS, *WORD_CODE_SDKS) if f"`{part}`" not in text] == []


SDK = {"User-Agent": "OpenAI/Python 3.57.0"}


@pytest.mark.parametrize("tuned", [{"server": {"body_bytes_max": 65_536}}])
@pytest.mark.parametrize(
    ("method", "path", "arguments", "status"),
    [
        ("GET", "/nowhere", {}, 404),
        ("GET", "/v1/chat/completions", {}, 405),
        ("POST", "/v1/chat/completions", {}, 401),
        ("POST", "/v1/chat/completions", {"data": b" " * 70_000}, 413),
        ("POST", "/v1/chat/completions", {"headers": {"Expect": "200-ok"}}, 417),
    ],
)
async def test_errors_before_any_handler_have_the_form_too(
    gateway: Gateway, method: str, path: str, arguments: dict[str, Any], status: int
) -> None:
    for sdk, kind in ((SDK, dict), ({}, str)):
        headers = {**arguments.get("headers", {}), **sdk}
        async with gateway.session.request(method, gateway.url + path, **{**arguments, "headers": headers}) as response:
            assert response.status == status
            assert response.content_type == "application/json"
            assert isinstance(json.loads(await response.read())["error"], kind)


async def test_a_402_has_the_words_that_clients_search_for(gateway: Gateway) -> None:
    """aider does not repeat an error whose text, in small letters, has both; LiteLLM gives it the message, or OpenRouter's whole body."""
    client = await gateway.client("0.5")
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    async with gateway.session.post(gateway.chat_url, json=body, headers={**client.headers, **SDK}) as response:
        text = await response.text()
    assert response.headers["x-should-retry"] == "false"
    message = json.loads(text)["error"]["message"]
    assert message == 'Insufficient balance (insufficient credits, "code":402)'
    for searched in (text, message):
        assert {words for words in ("insufficient credits", '"code":402') if words not in searched.lower()} == set()


@pytest.mark.parametrize("tuned", [{"errors": {"form": "text"}}])
async def test_the_setting_fixes_the_form_for_all(gateway: Gateway) -> None:
    async with gateway.session.post(gateway.chat_url, headers=SDK) as response:
        assert await response.text() == '{"error": "Invalid API key or inactive user"}'
