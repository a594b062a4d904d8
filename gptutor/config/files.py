"""The two files that settings stand in: `config.yaml`, and `gptutor.env` with what is secret or the machine's own.

What they say is not judged here (`config.py`, `settings.py`), only whether it can be read, and only in one way.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from gptutor.config.schema import ConfigError

ENV_FILE = "gptutor.env"
ENV_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=([^\0]*)")
FORM = "write NAME=value, such as PORT=3001, or begin the line with # for a comment"


def read_env_file(path: Path) -> dict[str, str]:
    """Name → value; nothing if there is no such file. Values may be secrets, and stand in no message. Raises ConfigError."""
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ConfigError(
            f"{ENV_FILE} cannot be read: {error.strerror}. Run this as the user whom it belongs to, or give it to this one."
        ) from error
    values = {}
    for number, written in enumerate(lines, 1):
        try:
            line = written.decode().strip()
        except UnicodeDecodeError:
            raise ConfigError(f"{ENV_FILE}, line {number}, is not UTF-8: write it anew in that encoding.") from None
        if not line or line.startswith(("#", ";")):
            continue
        found = ENV_LINE.fullmatch(line)
        if found is None:
            raise ConfigError(f"{ENV_FILE}, line {number}, is not a setting: {FORM}.")
        value = _unquoted(found[2].strip())
        if value.startswith(("$(", "`")):
            raise ConfigError(f"{ENV_FILE}, line {number}: no command is run here; write what it prints in the place of it.")
        values[found[1]] = value
    return values


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


class _SetTwice(Exception):
    pass


class _Loader(yaml.BaseLoader):
    """Keeps every scalar as the text that the operator wrote, and takes no name twice: YAML's own loader keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        names = set()
        for key, _ in node.value:
            name = self.construct_object(key)
            if name in names:
                raise _SetTwice(f"{name} in line {key.start_mark.line + 1} for the second time")
            names.add(name)
        return mapping


def read_settings(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Section → key → text; and for a section and a `section.key`, the words that name its place. Raises ConfigError."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}  # noqa: S506 - it makes nothing but text
    except OSError as error:
        raise ConfigError(f"The settings file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The settings file {path} is not UTF-8.") from error
    except RecursionError as error:
        raise ConfigError(f"The settings file {path} is nested too deeply.") from error
    except _SetTwice as error:
        raise ConfigError(f"The settings file {path} names {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"The settings file {path} is not valid YAML: {error}") from error
    form = "must hold sections of `name: value` lines, as the shipped config.yaml does"
    if not isinstance(document, dict):
        raise ConfigError(f"The settings file {path} {form}.")
    settings, origin = {}, {}
    for section, keys in document.items():
        if keys and not isinstance(keys, dict):
            raise ConfigError(f"The settings file {path} {form}: {section} is none.")
        settings[section] = dict(keys or {})
        origin[section] = f"{path}: {section}"
        origin |= {f"{section}.{key}": f"{path}: {section}.{key}" for key in settings[section]}
    return settings, origin
