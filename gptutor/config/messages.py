"""An operator's sentence for a setting that cannot be: what it must be, in his words, instead of the converter's."""

import re
import types
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec

from gptutor.config.schema import Config

SECRETS = frozenset(
    {
        "security.secret_key",
        "security.old_secret_keys",
        "vk.secret_key",
        "admin.token",
        "yookassa.secret_key",
        "openrouter.api_key",
        "openrouter.old_api_keys",
        "openrouter.management_key",
        "openrouter.proxy",
        "database.url",
    }
)
"""Settings whose values are never shown."""
KINDS: Mapping[Any, str] = types.MappingProxyType(
    {int: "a whole number", float: "a number", Decimal: "a number such as 92.5", bool: "true or false"}
)
UNKNOWN = re.compile(r"unknown field `(.*)`")
# All but a range, which msgspec tells well enough.
NOT_OF_ITS_KIND = re.compile(r"Expected `\w+`, got |Expected `str` matching |Invalid (enum value|decimal)")


def sentence(fault: str, settings: Mapping[str, Mapping[str, Any]], origin: Mapping[str, str], path: str) -> str:
    """From msgspec's fault, which ends in the place: ``… - at `$.server.port` ``."""
    what, _, place = fault.partition(" - at ")
    dotted = place.strip("`").removeprefix("$").lstrip(".")
    if unknown := UNKNOWN.search(what):
        dotted = f"{dotted}.{unknown[1]}" if dotted else unknown[1]
        return f"{origin.get(dotted, f'{path}: {dotted}')} is not a setting. The settings are listed in the shipped config.yaml."
    section, _, key = dotted.partition(".")
    if not key and " must be " in what:
        dotted, _, allowed = what.partition(" must be ")
        return f"{origin.get(dotted, dotted)} must be {allowed}."
    name = origin.get(dotted, dotted)
    shown = "" if dotted in SECRETS else f" (it is {settings.get(section, {}).get(key, '')!r})"
    if NOT_OF_ITS_KIND.match(what):
        return f"{name} must be {_kind(section, key)}{shown}."
    return f"{name} is wrong{shown}: {what[:1].lower()}{what[1:]}."


def _kind(section: str, key: str) -> str:
    """What a setting must be, by its declaration."""
    sections = {field.name: field.type for field in msgspec.structs.fields(Config)}
    declared = {field.name: field.type for field in msgspec.structs.fields(sections[section])}.get(key)
    if get_origin(declared) is Annotated:
        declared, *said = get_args(declared)
        if described := next((meta.description for meta in said if meta.description), None):
            return str(described)
    if get_origin(declared) is Literal:
        return f"one of {', '.join(get_args(declared))}"
    return KINDS.get(declared, "a text")
