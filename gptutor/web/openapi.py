"""The OpenAPI description: `openapi.yaml`, with what the code says itself filled in, so that no rule is written twice."""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import yaml

from gptutor import __version__
from gptutor.api.chat.request import ChatRequest
from gptutor.api.keys import KeyLimitsPatch, NewKey
from gptutor.errors import ERRORS, ErrorKind

SOURCE = Path(__file__).parent / "openapi.yaml"


def describe() -> dict[str, Any]:
    """The whole document, ready to be printed as JSON."""
    document: dict[str, Any] = yaml.safe_load(SOURCE.read_text(encoding="utf-8"))
    document["info"]["version"] = __version__
    components = document["components"]
    schemas = components["schemas"]
    for name, schema in request_schemas().items():
        schemas[name] = worded(schema, schemas[name])
    schemas["ErrorCode"]["enum"] = list(ERRORS)
    components["responses"] = {
        f"Refused{status}": refusal(dict(kinds)) for status, kinds in groupby(by_status(), key=lambda item: item[1].status)
    }
    return document


def request_schemas() -> dict[str, Any]:
    """The fields and ranges that the gateway checks, as it checks them."""
    _, schemas = msgspec.json.schema_components(
        [ChatRequest, NewKey, KeyLimitsPatch],
        schema_hook=lambda amount: {"type": ["number", "string"], "format": "decimal"},  # an Amount: both are read exactly
        ref_template="#/components/schemas/{name}",
    )
    for schema in schemas.values():
        schema.setdefault("additionalProperties", True)
        for field in schema["properties"].values():
            if "default" in field and field["default"] is None:
                del field["default"]  # null means absent, which is no news in a description
    return schemas


def worded(schema: Mapping[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    """A schema with the words for it: hand-written descriptions win over made ones."""
    merged = {**schema, **words}
    for name, value in words.items():
        if isinstance(value, dict):
            merged[name] = worded(schema[name], value)
    return merged


def by_status() -> list[tuple[str, ErrorKind]]:
    return sorted(ERRORS.items(), key=lambda item: item[1].status)


def refusal(kinds: Mapping[str, ErrorKind]) -> dict[str, Any]:
    """The response with which all kinds of one status are told."""
    promised = {name for kind in kinds.values() for name in kind.headers}
    return {
        "description": "\n".join(f"- `{code}`: {kind.text}" for code, kind in kinds.items()),
        "headers": {
            "X-Request-ID": {"$ref": "#/components/headers/X-Request-ID"},
            "X-Error-Code": {"description": "What happened.", "required": True, "schema": {"enum": list(kinds)}},
            **{name: {"$ref": f"#/components/headers/{name}"} for name in sorted(promised)},
        },
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/Error"},
                "examples": {code: {"value": {"error": kind.text}} for code, kind in kinds.items()},
            }
        },
    }
