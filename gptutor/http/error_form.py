"""The form of an error's body: the documented text, or the object that SDKs read (contract B1).

Today's OpenAI SDKs show only `error.message` of an object, and OpenRouter's SDKs validate `error.code` as a number. Which client
asks is decided from the request's headers, when an error is built and never before.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from gptutor.errors import ApiError

ErrorForm = Literal["auto", "text", "object"]

STAINLESS = "x-stainless-"
"""The prefix of the headers of SDKs that Stainless generates, as OpenAI's are."""
NUMBER_CODE_SDKS = ("openrouter",)
"""Parts of a User-Agent, in lower case, of the SDKs that OpenRouter publishes: `error.code` must be the status."""
WORD_CODE_SDKS = ("openai/", "ai-sdk", "litellm/", "langchain")
"""… of the other SDKs whose error classes read an object."""

ERROR_TYPES = {401: "authentication_error", 402: "insufficient_quota", 403: "permission_error", 429: "rate_limit_error"}
"""`error.type` by status, in OpenAI's words; the others are below."""

CREDITS_ARE_USED_UP = '(insufficient credits, "code":402)'
"""Added to the text of a 402. aider repeats a request nine times unless it finds these words of OpenRouter's in all
that LiteLLM tells it: for OpenAI-compatible services, the message alone."""


def error_document(error: ApiError, form: ErrorForm, headers: Mapping[str, str]) -> dict[str, Any]:
    """The body of the response, in the form for a client that sent these `headers`."""
    user_agent = headers.get("User-Agent", "").lower()
    reads_numbers = _has_any(user_agent, NUMBER_CODE_SDKS)
    if form == "text" or (
        form == "auto" and not (reads_numbers or _has_any(user_agent, WORD_CODE_SDKS) or _is_stainless(headers))
    ):
        return {"error": error.text, **error.extra}
    return {"error": _error_object(error, code_is_number=reads_numbers), **error.extra}


def _has_any(text: str, parts: Iterable[str]) -> bool:
    return any(part in text for part in parts)


def _is_stainless(headers: Mapping[str, str]) -> bool:
    return any(name.lower().startswith(STAINLESS) for name in headers)


def _error_object(error: ApiError, *, code_is_number: bool) -> dict[str, Any]:
    message, code = error.text, error.code
    if error.status == 402:
        message, code_is_number = f"{message} {CREDITS_ARE_USED_UP}", True
    return {
        "message": message,
        "type": ERROR_TYPES.get(error.status) or ("server_error" if error.status >= 500 else "invalid_request_error"),
        "code": error.status if code_is_number else code,
        "param": None,
    }
