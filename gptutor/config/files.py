"""Reading the two settings files: `config.yaml`, and `gptutor.env` for secrets and what differs between machines.

Only the syntax is checked here; names and values are checked in `load.py` against `schema.py`.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from gptutor.config.schema import ConfigError

ENV_FILE = "gptutor.env"
ENV_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=([^\0]*)")
LINE_FORMAT = "write NAME=value, such as PORT=3001, or begin the line with # for a comment"


def read_env_file(path: Path) -> dict[str, str]:
    """Name → value; empty if there is no such file. Values may be secrets and appear in no message. Raises ConfigError."""
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ConfigError(
            f"{ENV_FILE} cannot be read: {error.strerror}. Run this as the owner of the file, or make this user the owner."
        ) from error
    values = {}
    for number, encoded in enumerate(lines, 1):
        try:
            line = encoded.decode().strip()
        except UnicodeDecodeError:
            raise ConfigError(f"{ENV_FILE}, line {number}, is not UTF-8: save the file in UTF-8.") from None
        if not line or line.startswith(("#", ";")):
            continue
        found = ENV_LINE.fullmatch(line)
        if found is None:
            raise ConfigError(f"{ENV_FILE}, line {number}, is not a setting: {LINE_FORMAT}.")
        value = _unquoted(found[2].strip())
        if value.startswith(("$(", "`")):
            raise ConfigError(f"{ENV_FILE}, line {number}: commands are not run; write the value itself.")
        values[found[1]] = value
    return values


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


class _DuplicateName(Exception):
    pass


class _UniqueNames(yaml.constructor.BaseConstructor):
    """Rejects duplicate names, of which YAML's own loader takes the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        names = set()
        for key, _ in node.value:
            name = self.construct_object(key)
            if name in names:
                raise _DuplicateName(f"{name} a second time in line {key.start_mark.line + 1}")
            names.add(name)
        return mapping


class _Loader(_UniqueNames, yaml.BaseLoader):
    """Leaves every scalar as text."""


class _QuickLoader(_UniqueNames, getattr(yaml, "CBaseLoader", yaml.BaseLoader)):  # type: ignore[misc]
    """The same by libyaml, ten times as fast, where the package has it."""


def _parsed(text: str) -> Any:
    """Raises yaml.YAMLError, with the place as the parser in Python names it: libyaml's is less exact."""
    try:
        return yaml.load(text, Loader=_QuickLoader)  # noqa: S506 - a BaseLoader makes nothing but text
    except yaml.YAMLError:
        return yaml.load(text, Loader=_Loader)  # noqa: S506


def _place(error: yaml.YAMLError) -> str:
    """Where the fault is, without what is there: the line may have a secret."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return "" if mark is None else f": line {mark.line + 1}, column {mark.column + 1}"


def read_settings(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Section → key → text; and for each `section` and `section.key`, where it is set, for messages. Raises ConfigError."""
    try:
        document = _parsed(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"The settings file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The settings file {path} is not UTF-8.") from error
    except RecursionError as error:
        raise ConfigError(f"The settings file {path} is nested too deeply.") from error
    except _DuplicateName as error:
        raise ConfigError(f"The settings file {path} names {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"The settings file {path} is not valid YAML{_place(error)}.") from None
    structure = "must consist of sections with `name: value` lines, as the shipped config.yaml does"
    if not isinstance(document, dict):
        raise ConfigError(f"The settings file {path} {structure}.")
    settings, origin = {}, {}
    for section, keys in document.items():
        if keys and not isinstance(keys, dict):
            raise ConfigError(f"The settings file {path} {structure}: {section} is not a section.")
        settings[section] = dict(keys or {})
        origin[section] = f"{path}: {section}"
        origin |= {f"{section}.{key}": f"{path}: {section}.{key}" for key in settings[section]}
    return settings, origin
