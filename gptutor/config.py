"""Settings: `config.yaml`, overridden by the environment, become one frozen `Config`.

What each setting means, with unit and reason, is written in `config.yaml`; here are its type, range and default.
Every scalar of the file is read as text and converted by its declared type, so the file and the environment follow one rule,
and an exact decimal never passes through a float.
"""

import base64
import binascii
import os
import re
import secrets
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
import yaml

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Name = Annotated[str, msgspec.Meta(min_length=1)]
Secret = Annotated[str, msgspec.Meta(pattern=r"^[!-~]*\Z")]

# Contract F8: names without the GPTUTOR_<SECTION>__ form.
SHORT_NAMES = {
    "HOST": "server.host",
    "PORT": "server.port",
    "DATABASE_URL": "database.url",
    "OPENROUTER_API_KEY": "openrouter.api_key",
    "OPENROUTER_BASE_URL": "openrouter.base_url",
    "GPTUTOR_WORKERS": "server.workers",
    "GPTUTOR_SECRET_KEY": "security.secret_key",
}
SECRETS = frozenset(
    {"security.secret_key", "openrouter.api_key", "openrouter.management_key", "openrouter.proxy", "database.url"}
)
"""Settings whose values are never shown."""
CONFIG_PATH_NAME = "GPTUTOR_CONFIG"
DEFAULT_FILE = Path(__file__).parent / "config.yaml"


class ConfigError(Exception):
    """A setting is unknown, impossible or missing; the text is a sentence for the operator."""


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    def __repr__(self) -> str:
        return f"<{type(self).__name__} settings>"  # values may be secrets, and a repr ends up in logs


class Server(Section, frozen=True):
    host: Name = "127.0.0.1"
    port: Port = 3001
    body_bytes_max: Count = 10 * 1024 * 1024
    header_s: Seconds = 10
    body_idle_s: Seconds = 10
    body_s: Seconds = 60
    linger_s: Seconds = 5
    keepalive_s: Seconds = 75
    shutdown_s: Seconds = 20
    drain_s: Seconds = 60
    workers: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    cors_origins: str = "*"

    def __post_init__(self) -> None:
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?", origin):
                raise ValueError(f"server.cors_origins must be *, or origins such as https://example.com, not {origin!r}")

    @property
    def allowed_origins(self) -> frozenset[str]:
        return frozenset(self.cors_origins.split())


class Paths(Section, frozen=True):
    data: Path = Path("var")
    logs: Path = Path("logs")


class Logs(Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    retention_days: Count = 30
    stdout: bool = True


class Metrics(Section, frozen=True):
    host: Name = "127.0.0.1"
    port: Port = 0


class Database(Section, frozen=True):
    url: str = ""
    connections_max: Annotated[int, msgspec.Meta(ge=1, le=100)] = 8
    acquire_s: Seconds = 2
    statement_s: Seconds = 5


class OpenRouter(Section, frozen=True):
    api_key: Secret = ""
    proxy: str = ""
    base_url: Annotated[str, msgspec.Meta(pattern=r"^https?://[^/\s]+(/\S*)?$")] = "https://openrouter.ai/api/v1"
    management_key: Secret = ""
    default_model: Name = "google/gemini-2.5-flash-lite"
    referer: Annotated[str, msgspec.Meta(pattern=r"^[ -~]*\Z")] = ""
    title: Annotated[str, msgspec.Meta(pattern=r"^[ -~]*\Z")] = "GPTutor"
    connect_s: Seconds = 10
    total_s: Seconds = 60
    first_byte_s: Seconds = 60
    idle_s: Seconds = 60
    end_s: Seconds = 5
    connections_max: Count = 2000
    attempts_max: Annotated[int, msgspec.Meta(ge=1, le=10)] = 3
    models_refresh_s: Seconds = 600

    def __post_init__(self) -> None:
        for name, url in (("base_url", self.base_url), ("proxy", self.proxy)):
            if url and not is_address(url, with_path=name == "base_url"):
                raise ValueError(f"openrouter.{name} must be an address such as https://host:port")


def is_address(url: str, *, with_path: bool) -> bool:
    """Whether a URL of http or https names a host, a possible port, and no more than a path."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    more = parts.query or parts.fragment or (not with_path and parts.path.strip("/"))
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and not more and url.isascii()


def _check_decimal(name: str, value: Decimal, least: Decimal, most: Decimal) -> None:
    if not (value.is_finite() and least <= value <= most):
        raise ValueError(f"billing.{name} must be a number from {least} to {most}, not {value}")


class Billing(Section, frozen=True):
    rub_per_usd: Decimal = Decimal(90)
    balance_min_rub: Decimal = Decimal(1)
    margin: Decimal = Decimal("1.1")
    output_tokens_typical: Count = 4096
    output_tokens_min: Count = 16
    reserve: Literal["typical", "worst_case"] = "typical"
    hold_default_rub: Decimal = Decimal(10)
    image_tokens: Count = 8192
    paid_tool_usd: Decimal = Decimal("0.05")
    cache_write_factor: Decimal = Decimal(2)
    hurry_factor: Decimal = Decimal(2)

    def __post_init__(self) -> None:
        # msgspec has no ranges for Decimal, so they stand here.
        _check_decimal("rub_per_usd", self.rub_per_usd, Decimal("0.0001"), Decimal(100_000))
        _check_decimal("balance_min_rub", self.balance_min_rub, Decimal(0), Decimal(1_000_000))
        _check_decimal("margin", self.margin, Decimal(1), Decimal(10))
        _check_decimal("hold_default_rub", self.hold_default_rub, Decimal("0.01"), Decimal(1_000_000))
        _check_decimal("paid_tool_usd", self.paid_tool_usd, Decimal(0), Decimal(1000))
        _check_decimal("cache_write_factor", self.cache_write_factor, Decimal(1), Decimal(10))
        _check_decimal("hurry_factor", self.hurry_factor, Decimal(1), Decimal(10))


class RateLimit(Section, frozen=True):
    chat_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 600


class Relay(Section, frozen=True):
    heartbeat_s: Annotated[float, msgspec.Meta(ge=0.05, le=86_400)] = 15
    buffer_bytes: Annotated[int, msgspec.Meta(ge=4096)] = 256 * 1024
    write_s: Seconds = 60
    leaver_drain_s: Seconds = 30
    leaver_drain_bytes: Count = 1024 * 1024


class Recovery(Section, frozen=True):
    poll_s: Seconds = 1
    look_max_s: Annotated[float, msgspec.Meta(ge=1, le=86_400)] = 600
    give_up_s: Annotated[float, msgspec.Meta(gt=0, le=30 * 86_400)] = 86_400
    journal_bytes_max: Annotated[int, msgspec.Meta(ge=1 << 20)] = 1 << 30


class Security(Section, frozen=True):
    secret_key: str = ""


class Simulator(Section, frozen=True):
    host: Name = "127.0.0.1"
    port: Port = 3002
    word_s: Annotated[float, msgspec.Meta(ge=0, le=60)] = 0.03
    first_word_s: Annotated[float, msgspec.Meta(ge=0, le=60)] = 0.3


class Docs(Section, frozen=True):
    host: Name = "127.0.0.1"
    port: Port = 8080


class Config(Section, frozen=True):
    server: Server = Server()
    paths: Paths = Paths()
    logs: Logs = Logs()
    metrics: Metrics = Metrics()
    database: Database = Database()
    openrouter: OpenRouter = OpenRouter()
    billing: Billing = Billing()
    rate_limit: RateLimit = RateLimit()
    relay: Relay = Relay()
    recovery: Recovery = Recovery()
    security: Security = Security()
    simulator: Simulator = Simulator()
    docs: Docs = Docs()

    @property
    def embedded(self) -> bool:
        """Whether the embedded PostgreSQL is used (contract F9)."""
        return not self.database.url

    @property
    def simulated(self) -> bool:
        """Whether the built-in simulator stands in for OpenRouter (contract F9)."""
        return not self.openrouter.api_key

    def secret_key(self) -> bytes:
        """The 32 bytes from which all secrets of this installation derive.

        With the embedded database they are made on first use and kept in `paths.data`. Raises ConfigError where an own
        database is configured without a key: a key on one machine's disk would not survive a second machine.
        """
        text = self.security.secret_key
        if not text:
            if not self.embedded:
                raise ConfigError(
                    "GPTUTOR_SECRET_KEY is missing: with a database of your own it must be set, the same on every "
                    "machine. Make one with: openssl rand -base64 32"
                )
            text = kept_secret(self.paths.data / "secret-key", lambda: base64.b64encode(secrets.token_bytes(32)).decode())
        try:
            key = base64.b64decode(text, validate=True)
        except binascii.Error:
            key = b""
        if len(key) != 32:
            raise ConfigError("GPTUTOR_SECRET_KEY must be 32 bytes in base64. Make one with: openssl rand -base64 32")
        return key


def kept_secret(path: Path, make: Any) -> str:
    """The text kept in `path`, made by `make()` on first use; readable by its owner alone."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    text: str = make()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text + "\n")
    return text


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
