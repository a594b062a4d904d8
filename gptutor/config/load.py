"""`load()`: the settings of `config.yaml`, overridden by `gptutor.env`, overridden by credentials, overridden by the environment.

The result is one frozen `Config`.

Every value is read as text and converted to the type that `schema.py` declares, so the same rules hold for the files and the
environment, and an exact decimal never passes through a float.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from gptutor.config.credentials import read_credentials
from gptutor.config.files import ENV_FILE, read_env_file, read_settings
from gptutor.config.messages import error_sentence
from gptutor.config.schema import Config, ConfigError, OpenRouterSettings
from gptutor.config.urls import is_address

# Contract F8: the variables that are not named GPTUTOR_<SECTION>__<KEY>.
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
CONFIG_PATH_VARIABLE = "GPTUTOR_CONFIG"
PROXY_VARIABLES = ("HTTPS_PROXY", "NO_PROXY")
DEFAULT_FILE = Path(__file__).parent.parent / "config.yaml"


def load(environ: Mapping[str, str] | None = None) -> Config:
    """The settings of this process. With `environ`, that takes the place of the environment and of `gptutor.env`.

    Every call reads the files again. Raises ConfigError.
    """
    if environ is None:
        environment: Mapping[str, str] = os.environ
        env_file = read_env_file(Path(environment.get(CONFIG_PATH_VARIABLE, "")).parent / ENV_FILE)
    else:
        environment, env_file = environ, {}
    _require_utf8(environment)
    credentials = read_credentials(environment)
    _require_settings(credentials)
    sources = [(env_file, f" in {ENV_FILE}"), (credentials, ", a credential,"), (environment, "")]
    named = environment.get(CONFIG_PATH_VARIABLE) or env_file.get(CONFIG_PATH_VARIABLE)
    path = Path(named) if named else Path("config.yaml")
    if not named and not path.exists():
        path = DEFAULT_FILE
    settings, origin = read_settings(path)
    for variables, where in sources:
        for name, dotted in settings_of(variables, where).items():
            section, _, key = dotted.partition(".")
            if section not in settings:
                settings[section], origin[section] = {}, name + where
            settings[section][key], origin[dotted] = variables[name], name + where
    try:
        config = msgspec.convert(settings, Config, strict=False, dec_hook=lambda kind, text: kind(text))
    except msgspec.ValidationError as error:
        hidden = {dotted for dotted, where in origin.items() if where.endswith(", a credential,")}
        raise ConfigError(error_sentence(str(error), settings, origin, str(path), hidden)) from error
    if not config.openrouter.proxy and not config.simulated:
        proxy = _proxy_from_environment(config.openrouter, sources)
        config = msgspec.structs.replace(config, openrouter=msgspec.structs.replace(config.openrouter, proxy=proxy))
    if config.simulated and "openrouter.base_url" in origin and config.openrouter.base_url != OpenRouterSettings().base_url:
        raise ConfigError("OPENROUTER_BASE_URL is set, but OPENROUTER_API_KEY is not: set both, or neither for the simulator.")
    return config


def _require_settings(credentials: Mapping[str, str]) -> None:
    """A misspelt name must not start the service without its key, with the simulator. Raises ConfigError."""
    for name in credentials:
        if name not in (*SHORT_NAMES, *PROXY_VARIABLES) and (name == CONFIG_PATH_VARIABLE or not name.startswith("GPTUTOR_")):
            raise ConfigError(
                f"The credential {name} is not a setting. Secrets are named as in gptutor.env: OPENROUTER_API_KEY, DATABASE_URL …"
            )


def _require_utf8(environ: Mapping[str, str]) -> None:
    """Python decodes an invalid byte to a lone surrogate, which no message or log could print. Raises ConfigError."""
    for name, value in environ.items():
        try:
            (name + value).encode()
        except UnicodeEncodeError:
            if name in SHORT_NAMES or name.startswith("GPTUTOR_"):
                raise ConfigError(f"{name.encode(errors='replace').decode()} is not UTF-8.") from None


def _proxy_from_environment(openrouter: OpenRouterSettings, sources: Sequence[tuple[Mapping[str, str], str]]) -> str:
    """HTTPS_PROXY, unless NO_PROXY exempts OpenRouter's host. Raises ConfigError."""
    url = urlsplit(openrouter.base_url)
    exempt, _ = _in_either_case("NO_PROXY", sources)
    if url.scheme != "https" or _is_exempt(url.hostname or "", exempt):
        return ""
    proxy, where = _in_either_case("HTTPS_PROXY", sources)
    proxy = proxy if "://" in proxy or not proxy else f"http://{proxy}"
    if proxy and not is_address(proxy, with_path=False):
        raise ConfigError(f"HTTPS_PROXY{where} must be an address such as http://host:3128.")
    return proxy


def _in_either_case(name: str, sources: Sequence[tuple[Mapping[str, str], str]]) -> tuple[str, str]:
    """The value of NAME or name, and for messages where it is set. An empty variable hides the file's. The last source wins."""
    for variables, where in reversed(sources):
        if name in variables or name.lower() in variables:
            return variables.get(name) or variables.get(name.lower()) or "", where
    return "", ""


def _is_exempt(host: str, exempt: str) -> bool:
    names = [name.strip().lstrip(".").lower() for name in exempt.split(",")]
    return any(name in ("*", host) or host.endswith(f".{name}") for name in names if name)


def settings_of(variables: Mapping[str, str], where: str) -> dict[str, str]:
    """Variable → `section.key`, for every variable that names a setting. Raises ConfigError."""
    names = {name: dotted for name, dotted in SHORT_NAMES.items() if name in variables}
    for name in variables:
        if name.startswith("GPTUTOR_") and name not in SHORT_NAMES and name != CONFIG_PATH_VARIABLE:
            section, separator, key = name.removeprefix("GPTUTOR_").lower().partition("__")
            if not separator:
                raise ConfigError(
                    f"{name}{where} is not a setting. Settings are named GPTUTOR_<SECTION>__<KEY>, as in config.yaml."
                )
            names[name] = f"{section}.{key}"
    return names
