"""Errors of settings, in the operator's words instead of the converter's: which setting is wrong, and what it must be."""

import re
import types
from collections.abc import Collection, Mapping
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
"""Settings whose values appear in no message."""
TYPE_NAMES: Mapping[Any, str] = types.MappingProxyType(
    {int: "a whole number", float: "a number", Decimal: "a number such as 92.5", bool: "true or false"}
)
UNKNOWN_FIELD = re.compile(r"unknown field `(.*)`")
# Every error but a value out of range, for which msgspec's own words are clear enough.
WRONG_TYPE = re.compile(r"Expected `\w+`, got |Expected `str` matching |Invalid (enum value|decimal)")


def error_sentence(
    error: str,
    settings: Mapping[str, Mapping[str, Any]],
    origin: Mapping[str, str],
    path: str,
    hidden: Collection[str] = (),
) -> str:
    """A sentence for a msgspec error, which ends in the place of the fault: ``… - at `$.server.port` ``.

    `settings` are the values by section and key; `origin` names for `section.key` the variable or the line that set it; `path` is
    the settings file. The values of `hidden` are not shown, as those of SECRETS.
    """
    what, _, place = error.partition(" - at ")
    dotted = place.strip("`").removeprefix("$").lstrip(".")
    if unknown := UNKNOWN_FIELD.search(what):
        dotted = f"{dotted}.{unknown[1]}" if dotted else unknown[1]
        return f"{origin.get(dotted, f'{path}: {dotted}')} is not a setting. The settings are listed in the shipped config.yaml."
    section, _, key = dotted.partition(".")
    if not key and " must be " in what:
        dotted, _, allowed = what.partition(" must be ")
        return f"{origin.get(dotted, dotted)} must be {allowed}."
    name = origin.get(dotted, dotted)
    value = "" if dotted in SECRETS or dotted in hidden else f" (it is {settings.get(section, {}).get(key, '')!r})"
    if WRONG_TYPE.match(what):
        return f"{name} must be {_expected(section, key)}{value}."
    return f"{name} is wrong{value}: {what[:1].lower()}{what[1:]}."


def _expected(section: str, key: str) -> str:
    """What a setting must be, by its declaration in the schema."""
    sections = {field.name: field.type for field in msgspec.structs.fields(Config)}
    declared = {field.name: field.type for field in msgspec.structs.fields(sections[section])}.get(key)
    if get_origin(declared) is Annotated:
        declared, *metadata = get_args(declared)
        if description := next((meta.description for meta in metadata if meta.description), None):
            return str(description)
    if get_origin(declared) is Literal:
        return f"one of {', '.join(get_args(declared))}"
    return TYPE_NAMES.get(declared, "a text")
