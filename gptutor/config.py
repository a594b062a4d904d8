"""Reading the settings: `config.yaml`, overridden by the environment, becomes one frozen `Config`.

Every scalar of the file is read as text and converted by its declared type (`settings.py`), so the file and the environment
follow one rule, and an exact decimal never passes through a float.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import yaml

from gptutor.settings import Config, ConfigError, OpenRouter, is_address

# Contract F8: names without the GPTUTOR_<SECTION>__ form.
SHORT_NAMES = {
    "HOST": "server.host",
    "PORT": "server.port",
    "DATABASE_URL": "database.url",
    "OPENROUTER_API_KEY": "openrouter.api_key",
    "OPENROUTER_BASE_URL": "openrouter.base_url",
    "VK_APP_ID": "vk.app_id",
    "VK_SECRET_KEY": "vk.secret_key",
    "GPTUTOR_WORKERS": "server.workers",
    "GPTUTOR_SECRET_KEY": "security.secret_key",
}
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
CONFIG_PATH_NAME = "GPTUTOR_CONFIG"
DEFAULT_FILE = Path(__file__).parent / "config.yaml"


def load(environ: Mapping[str, str] = os.environ) -> Config:
    """Reads the settings of this process. Raises ConfigError."""
    named = environ.get(CONFIG_PATH_NAME)
    path = Path(named) if named else Path("config.yaml")
    if not named and not path.exists():
        path = DEFAULT_FILE
    settings, origin = _read_file(path)
    _refuse_what_is_no_text(environ)
    for name, dotted in _from_environment(environ).items():
        section, _, key = dotted.partition(".")
        settings.setdefault(section, {})[key] = environ[name]
        origin[dotted] = name
    try:
        config = msgspec.convert(settings, Config, strict=False, dec_hook=lambda kind, text: kind(text))
    except msgspec.ValidationError as error:
        raise ConfigError(_sentence(str(error), settings, origin, str(path))) from error
    if not config.openrouter.proxy and not config.simulated:
        config = msgspec.structs.replace(
            config, openrouter=msgspec.structs.replace(config.openrouter, proxy=_environments_proxy(config.openrouter, environ))
        )
    if config.simulated and "openrouter.base_url" in origin and config.openrouter.base_url != OpenRouter().base_url:
        raise ConfigError("OPENROUTER_BASE_URL is set, but OPENROUTER_API_KEY is not: set both, or neither for the simulator.")
    return config


def _refuse_what_is_no_text(environ: Mapping[str, str]) -> None:
    """A byte that is not UTF-8 comes as half a character, which nothing can print."""
    for name, value in environ.items():
        try:
            (name + value).encode()
        except UnicodeEncodeError:
            if name in SHORT_NAMES or name.startswith("GPTUTOR_"):
                raise ConfigError(f"{name.encode(errors='replace').decode()} is not UTF-8.") from None


def _environments_proxy(openrouter: OpenRouter, environ: Mapping[str, str]) -> str:
    """What HTTPS_PROXY says, if it is meant for OpenRouter. Raises ConfigError."""
    url = urlsplit(openrouter.base_url)
    proxy = environ.get("HTTPS_PROXY") or environ.get("https_proxy") or ""
    exempt = environ.get("NO_PROXY") or environ.get("no_proxy") or ""
    if url.scheme != "https" or _is_exempt(url.hostname or "", exempt):
        return ""
    proxy = proxy if "://" in proxy or not proxy else f"http://{proxy}"
    if proxy and not is_address(proxy, with_path=False):
        raise ConfigError("HTTPS_PROXY must be an address such as http://host:3128.")
    return proxy


def _is_exempt(host: str, exempt: str) -> bool:
    names = [name.strip().lstrip(".").lower() for name in exempt.split(",")]
    return any(name in ("*", host) or host.endswith(f".{name}") for name in names if name)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        # BaseLoader keeps every scalar as the text that the operator wrote.
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}  # noqa: S506
    except OSError as error:
        raise ConfigError(f"The settings file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The settings file {path} is not UTF-8.") from error
    except RecursionError as error:
        raise ConfigError(f"The settings file {path} is nested too deeply.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"The settings file {path} is not valid YAML: {error}") from error
    if not isinstance(document, dict) or not all(isinstance(section, dict) for section in document.values()):
        raise ConfigError(f"The settings file {path} must hold sections of `name: value` lines, as the shipped config.yaml does.")
    origin = {f"{section}.{key}": f"{path}: {section}.{key}" for section, keys in document.items() for key in keys}
    return document, origin


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Environment name → dotted setting, for every variable that is ours."""
    names = {name: dotted for name, dotted in SHORT_NAMES.items() if name in environ}
    for name in environ:
        if name.startswith("GPTUTOR_") and name not in SHORT_NAMES and name != CONFIG_PATH_NAME:
            section, separator, key = name.removeprefix("GPTUTOR_").lower().partition("__")
            if not separator:
                raise ConfigError(f"{name} is not a setting. Settings are named GPTUTOR_<SECTION>__<KEY>, as in config.yaml.")
            names[name] = f"{section}.{key}"
    return names


def _sentence(fault: str, settings: Mapping[str, Any], origin: Mapping[str, str], path: str) -> str:
    """An operator's sentence from msgspec's fault, which ends in the place: ``… - at `$.server.port` ``."""
    what, _, place = fault.partition(" - at ")
    dotted = place.strip("`").removeprefix("$").lstrip(".")
    if unknown := re.search(r"unknown field `(.*)`", what):
        dotted = ".".join(filter(None, (dotted, unknown[1])))
        return f"{origin.get(dotted, f'{path}: {dotted}')} is not a setting. The settings are listed in the shipped config.yaml."
    section, _, key = dotted.partition(".")
    if not key and " must be " in what:
        dotted, _, allowed = what.partition(" must be ")
        return f"{origin.get(dotted, dotted)} must be {allowed}."
    value = settings.get(section, {}).get(key, "")
    shown = "" if dotted in SECRETS else f" (it is {value!r})"
    return f"{origin.get(dotted, dotted)} is wrong{shown}: {what[:1].lower()}{what[1:]}."
