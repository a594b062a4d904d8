"""The OpenAPI description: `openapi.yaml`, completed from the code, so that no rule is written twice."""

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
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where the package has it: ten times as fast."""


def describe() -> dict[str, Any]:
    """The whole document, ready to be printed as JSON."""
    document: dict[str, Any] = yaml.load(SOURCE.read_text(encoding="utf-8"), Loader=LOADER)  # noqa: S506 - it is a safe one
    document["info"]["version"] = __version__
    components = document["components"]
    schemas = components["schemas"]
    for name, schema in request_schemas().items():
        schemas[name] = merge(schema, schemas[name])
    schemas["ErrorCode"]["enum"] = list(ERRORS)
    components["responses"] = {
        f"Error{status}": error_response(dict(kinds)) for status, kinds in groupby(by_status(), key=lambda item: item[1].status)
    }
    return document


def request_schemas() -> dict[str, Any]:
    """The fields and ranges of request bodies, from the types that check them."""
    _, schemas = msgspec.json.schema_components(
        [ChatRequest, NewKey, KeyLimitsPatch],
        schema_hook=lambda amount: {"type": ["number", "string"], "format": "decimal"},  # Amount, the one custom type
        ref_template="#/components/schemas/{name}",
    )
    for schema in schemas.values():
        schema.setdefault("additionalProperties", True)
        for field in schema["properties"].values():
            if "default" in field and field["default"] is None:
                del field["default"]  # null means absent, so it is not worth describing
            if "anyOf" in field:  # for JSON Schema, 5.0 is an integer as it is
                field["anyOf"] = [kind for kind in field["anyOf"] if kind.get("multipleOf") != 1]
    return schemas


def merge(generated: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """The generated schema, with the hand-written descriptions in place of its own."""
    merged = {**generated, **written}
    for name, value in written.items():
        if isinstance(value, dict):
            merged[name] = merge(generated[name], value)
    return merged


def by_status() -> list[tuple[str, ErrorKind]]:
    return sorted(ERRORS.items(), key=lambda item: item[1].status)


def error_response(kinds: Mapping[str, ErrorKind]) -> dict[str, Any]:
    """The response that all errors of one status share."""
    headers = {name for kind in kinds.values() for name in kind.headers}
    return {
        "description": "\n".join(f"- `{code}`: {kind.text}" for code, kind in kinds.items()),
        "headers": {
            "X-Request-ID": {"$ref": "#/components/headers/X-Request-ID"},
            "X-Error-Code": {"description": "The error code.", "required": True, "schema": {"enum": list(kinds)}},
            **{name: {"$ref": f"#/components/headers/{name}"} for name in sorted(headers)},
        },
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/Error"},
                "examples": {code: {"value": {"error": kind.text}} for code, kind in kinds.items()},
            }
        },
    }
