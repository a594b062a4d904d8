"""Sample values that are valid for a JSON Schema, for structured output and tool arguments."""

from collections.abc import Mapping
from typing import Any

DEPTH_MAX = 12
"""From this depth on, recursive schemas get their last alternative and the shortest arrays, so that recursion ends."""
FORMATS = {
    "date": "2025-01-01",
    "date-time": "2025-01-01T00:00:00Z",
    "email": "text@example.com",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def sample(schema: Any, root: Any = None, depth: int = 0) -> Any:
    """Strings are "text", numbers 1 or their bound, enums their first value; arrays have one item, objects what is required."""
    if not isinstance(schema, Mapping):
        return "text"
    root = schema if root is None else root
    if "$ref" in schema:
        return sample(_resolved(schema["$ref"], root), root, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for choice in ("anyOf", "oneOf"):
        if schema.get(choice):
            return sample(schema[choice][0 if depth < DEPTH_MAX else -1], root, depth + 1)
    if schema.get("allOf"):
        return sample({key: value for part in schema["allOf"] for key, value in part.items()}, root, depth + 1)
    return _of_type(schema, root, depth)


def _of_type(schema: Mapping[str, Any], root: Any, depth: int) -> Any:
    kind = schema.get("type", "object" if "properties" in schema else "string")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            properties = schema.get("properties", {})
            return {name: sample(properties.get(name), root, depth + 1) for name in schema.get("required", properties)}
        case "array":
            items_min = schema.get("minItems", 0)
            count = items_min if depth >= DEPTH_MAX else max(1, items_min)
            return [sample(schema.get("items", {}), root, depth + 1)] * min(count, schema.get("maxItems", count))
        case "integer" | "number":
            return _number(schema)
        case "boolean":
            return True
        case "null":
            return None
    text = FORMATS.get(schema.get("format", ""), "text").ljust(schema.get("minLength", 0), "x")
    return text[: schema.get("maxLength")]


def _number(schema: Mapping[str, Any]) -> int | float:
    low = max(1, schema.get("minimum", 1), schema.get("exclusiveMinimum", 0) + 1)
    return min(low, schema.get("maximum", low), schema.get("exclusiveMaximum", low + 1) - 1)  # type: ignore[no-any-return]


def _resolved(reference: str, root: Any) -> Any:
    """The part of the root schema that a reference such as `#/$defs/Name` points to."""
    part = root
    for key in reference.removeprefix("#").strip("/").split("/"):
        part = part[key] if key else part
    return part
