"""Reading the settings: `config.yaml`, overridden by `gptutor.env`, overridden by the environment, becomes one frozen `Config`.

Every scalar of the file is read as text and converted by its declared type (`settings.py`), so the files and the environment
follow one rule, and an exact decimal never passes through a float.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from gptutor.config.files import ENV_FILE, read_env_file, read_settings
from gptutor.config.messages import sentence
from gptutor.config.schema import Config, ConfigError, OpenRouterSettings
from gptutor.config.urls import is_address

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
CONFIG_PATH_NAME = "GPTUTOR_CONFIG"
DEFAULT_FILE = Path(__file__).parent.parent / "config.yaml"


def load(environ: Mapping[str, str] | None = None) -> Config:
    """The settings of this process, with those of the `gptutor.env` of its folder; or those of `environ`, and no such file.

    Read anew at every call: what was changed in the files since is taken. Raises ConfigError.
    """
    if environ is None:
        own: Mapping[str, str] = os.environ
        file = read_env_file(Path(own.get(CONFIG_PATH_NAME, "")).parent / ENV_FILE)
    else:
        own, file = environ, {}
    _refuse_what_is_no_text(own)
    named = own.get(CONFIG_PATH_NAME) or file.get(CONFIG_PATH_NAME)
    path = Path(named) if named else Path("config.yaml")
    if not named and not path.exists():
        path = DEFAULT_FILE
    settings, origin = read_settings(path)
    for source, where in ((file, f" in {ENV_FILE}"), (own, "")):
        for name, dotted in _ours(source, where).items():
            section, _, key = dotted.partition(".")
            if section not in settings:
                settings[section], origin[section] = {}, name + where
            settings[section][key], origin[dotted] = source[name], name + where
    try:
        config = msgspec.convert(settings, Config, strict=False, dec_hook=lambda kind, text: kind(text))
    except msgspec.ValidationError as error:
        raise ConfigError(sentence(str(error), settings, origin, str(path))) from error
    if not config.openrouter.proxy and not config.simulated:
        proxy = _environments_proxy(config.openrouter, own, file)
        config = msgspec.structs.replace(config, openrouter=msgspec.structs.replace(config.openrouter, proxy=proxy))
    if config.simulated and "openrouter.base_url" in origin and config.openrouter.base_url != OpenRouterSettings().base_url:
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


def _environments_proxy(openrouter: OpenRouterSettings, own: Mapping[str, str], file: Mapping[str, str]) -> str:
    """What HTTPS_PROXY says, if it is meant for OpenRouterSettings. Raises ConfigError."""
    url = urlsplit(openrouter.base_url)
    exempt, _ = _in_either_case("NO_PROXY", own, file)
    if url.scheme != "https" or _is_exempt(url.hostname or "", exempt):
        return ""
    proxy, where = _in_either_case("HTTPS_PROXY", own, file)
    proxy = proxy if "://" in proxy or not proxy else f"http://{proxy}"
    if proxy and not is_address(proxy, with_path=False):
        raise ConfigError(f"HTTPS_PROXY{where} must be an address such as http://host:3128.")
    return proxy


def _in_either_case(name: str, own: Mapping[str, str], file: Mapping[str, str]) -> tuple[str, str]:
    """The value, and where it stands if not in the environment. One that is there and empty hides the file's."""
    for source, where in ((own, ""), (file, f" in {ENV_FILE}")):
        if name in source or name.lower() in source:
            return source.get(name) or source.get(name.lower()) or "", where
    return "", ""


def _is_exempt(host: str, exempt: str) -> bool:
    names = [name.strip().lstrip(".").lower() for name in exempt.split(",")]
    return any(name in ("*", host) or host.endswith(f".{name}") for name in names if name)


def _ours(source: Mapping[str, str], where: str) -> dict[str, str]:
    """Name → dotted setting, for every variable that is ours."""
    names = {name: dotted for name, dotted in SHORT_NAMES.items() if name in source}
    for name in source:
        if name.startswith("GPTUTOR_") and name not in SHORT_NAMES and name != CONFIG_PATH_NAME:
            section, separator, key = name.removeprefix("GPTUTOR_").lower().partition("__")
            if not separator:
                raise ConfigError(
                    f"{name}{where} is not a setting. Settings are named GPTUTOR_<SECTION>__<KEY>, as in config.yaml."
                )
            names[name] = f"{section}.{key}"
    return names
