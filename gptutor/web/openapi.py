"""The OpenAPI descriptions, completed from the code, so that no rule is written twice: `openapi.yaml` is what clients call,
`admin-openapi.yaml` what administrators call."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import yaml

from gptutor import __version__
from gptutor.admin.money import NewBooking, NewPayment
from gptutor.admin.users import Erasure, KeyLimitsBody, NewUser, UserDescription
from gptutor.admin.users import NewKey as NewKeyOfUser
from gptutor.api.chat.request import ChatRequest
from gptutor.api.keys import KeyLimitsPatch, NewKey
from gptutor.errors import ERRORS, ErrorKind
from gptutor.text import ONE_LINE

SOURCE = Path(__file__).parent / "openapi.yaml"
ADMIN_SOURCE = Path(__file__).parent / "admin-openapi.yaml"
ADMIN_BODIES = (NewUser, UserDescription, Erasure, NewKeyOfUser, KeyLimitsBody, NewBooking, NewPayment)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where the package has it: ten times as fast."""


def describe() -> dict[str, Any]:
    """What clients call: the whole document, ready to be printed as JSON."""
    document = read(SOURCE)
    components = document["components"]
    schemas = components["schemas"]
    for name, schema in request_schemas((ChatRequest, NewKey, KeyLimitsPatch)).items():
        schema.setdefault("additionalProperties", True)
        schemas[name] = merge(schema, schemas[name])
    schemas["ErrorCode"]["enum"] = list(ERRORS)
    components["responses"] = error_responses(ERRORS)
    return document


def describe_admin() -> dict[str, Any]:
    """What administrators call: the whole document, ready to be printed as JSON."""
    document = read(ADMIN_SOURCE)
    components = document["components"]
    components["schemas"] |= request_schemas(ADMIN_BODIES)
    errors = error_responses({code: ERRORS[code] for code in components["schemas"]["ErrorCode"]["enum"]})
    with_request_id = {"headers": {"X-Request-ID": {"$ref": "#/components/headers/X-Request-ID"}}}
    for path, item in document["paths"].items():
        for operation in (item[method] for method in item if method != "parameters"):
            statuses = [400, 401, *([404] if "{" in path else []), *([408, 413, 415, 417] if "requestBody" in operation else [])]
            for status in (*statuses, 500, 503):
                operation["responses"][str(status)] = {"$ref": f"#/components/responses/Error{status}"}
            for response in operation["responses"].values():
                response |= {} if "$ref" in response else with_request_id
    for response in components["responses"].values():
        response |= with_request_id
    components["responses"] |= errors
    return document


def read(source: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.load(source.read_text(encoding="utf-8"), Loader=LOADER)  # noqa: S506 - it is a safe one
    document["info"]["version"] = __version__
    return document


def request_schemas(structs: Sequence[type[msgspec.Struct]]) -> dict[str, Any]:
    """The fields and ranges of request bodies, from the types that check them."""
    _, schemas = msgspec.json.schema_components(
        structs,
        schema_hook=lambda amount: {"type": ["number", "string"], "format": "decimal"},  # Amount, the one custom type
        ref_template="#/components/schemas/{name}",
    )
    for schema in schemas.values():
        for field in schema["properties"].values():
            if "default" in field and field["default"] is None:
                del field["default"]  # null means absent, so it is not worth describing
            if "anyOf" in field:  # for JSON Schema, 5.0 is an integer as it is
                field["anyOf"] = [kind for kind in field["anyOf"] if kind.get("multipleOf") != 1]
            for kind in (field, *field.get("anyOf", ())):
                if kind.get("pattern") == ONE_LINE:
                    del kind["pattern"]  # Python's characters, which no other regular expression knows; the description says it
                elif "pattern" in kind:
                    kind["pattern"] = kind["pattern"].replace(r"\Z", "$")
    return schemas


def merge(generated: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """The generated schema, with the hand-written descriptions in place of its own."""
    merged = {**generated, **written}
    for name, value in written.items():
        if isinstance(value, dict):
            merged[name] = merge(generated[name], value)
    return merged


def error_responses(kinds: Mapping[str, ErrorKind]) -> dict[str, Any]:
    """One response for all errors of a status, by name: Error400."""
    by_status = sorted(kinds.items(), key=lambda item: item[1].status)
    return {
        f"Error{status}": error_response(dict(of_status))
        for status, of_status in groupby(by_status, key=lambda item: item[1].status)
    }


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
