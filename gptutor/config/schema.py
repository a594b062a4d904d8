"""The settings: their names, types, ranges and defaults, as one frozen `Config`.

`config.yaml` documents each, with its unit and reason; `load.py` reads them. A type's description completes the sentence
"<setting> must be …".
"""

import ipaddress
import itertools
import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from gptutor.config.urls import is_address, is_database

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Name = Annotated[str, msgspec.Meta(min_length=1)]
Secret = Annotated[str, msgspec.Meta(pattern=r"^[!-~]*\Z", description="printable ASCII without spaces")]
Secrets = Annotated[str, msgspec.Meta(pattern=r"^[!-~]*( [!-~]+)*\Z", description="keys separated by one space")]
HeaderText = Annotated[str, msgspec.Meta(pattern=r"^[ -~]*\Z", description="printable ASCII")]
BaseUrl = Annotated[str, msgspec.Meta(pattern=r"^https?://[^/\s]+(/\S*)?\Z", description="an address such as https://host/path")]
AlertUrl = Annotated[
    str, msgspec.Meta(pattern=r"^(https?://[^/\s]+(/\S*)?)?\Z", description="an address such as https://host/path")
]
AutoOrBool = Annotated[bool | Literal["auto"], msgspec.Meta(description="auto, true or false")]
ReturnUrl = Annotated[str, msgspec.Meta(pattern=r"^(https?://\S+)?\Z", description="an address such as https://example.com/paid")]

ROUBLE_PLACES = 9
ALL_ADDRESSES = {"0.0.0.0", "::"}  # noqa: S104 - they are compared
TELEGRAM_TOKEN = re.compile(r"[0-9]+:[A-Za-z0-9_-]+")
ADMIN_CONNECTIONS_MAX = 3
"""To PostgreSQL, of each process's listener for administrators."""
ADMIN_CREDENTIAL = r"(?:(?P<name>[a-z][a-z0-9_-]{0,31}):)?(?P<secret>[!-9;-~]{32,256})"


class ConfigError(Exception):
    """A setting is unknown, invalid or missing; the text is a sentence for the operator."""


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"  # values may be secrets, and a repr can end up in a log


class ServerSettings(Section, frozen=True):
    host: Name = "127.0.0.1"
    port: Port = 3001
    body_bytes_max: Count = 10 * 1024 * 1024
    bodies_bytes_max: Count = 256 * 1024 * 1024
    large_bodies_per_account: Count = 32
    connections_max: Count = 4000
    connections_per_address_max: Count = 500
    header_s: Seconds = 10
    body_idle_s: Seconds = 10
    body_s: Seconds = 60
    linger_s: Seconds = 5
    keepalive_s: Seconds = 75
    keepalive_grace_s: Seconds = 5
    shutdown_s: Seconds = 20
    drain_s: Seconds = 60
    workers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    cors_origins: str = "*"
    trusted_proxies: str = "127.0.0.1 ::1"

    def __post_init__(self) -> None:
        for name in self.trusted_proxies.split():
            try:
                ipaddress.ip_network(name)
            except ValueError:
                raise ValueError(
                    f"server.trusted_proxies must be addresses or networks such as 10.0.0.0/8, not {name!r}"
                ) from None
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?", origin):
                raise ValueError(f"server.cors_origins must be *, or origins such as https://example.com, not {origin!r}")

    @property
    def allowed_origins(self) -> frozenset[str]:
        return frozenset(self.cors_origins.split())


class PathSettings(Section, frozen=True):
    data: Path = Path("var")
    logs: Path = Path("logs")


class LogSettings(Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    retention_days: Count = 30
    bytes_max: Annotated[int, msgspec.Meta(ge=4 << 20)] = 1 << 30
    file_bytes_max: Annotated[int, msgspec.Meta(ge=1 << 20)] = 64 << 20
    stdout: AutoOrBool = "auto"
    warnings_per_minute: Count = 20
    refused_per_minute: Count = 100

    def __post_init__(self) -> None:
        if self.file_bytes_max * 4 > self.bytes_max:
            raise ValueError("logs.file_bytes_max must be at most a quarter of logs.bytes_max")


class MetricsSettings(Section, frozen=True):
    host: Name = "127.0.0.1"
    port: Port = 0


class AdminSettings(Section, frozen=True):
    socket: str = ""
    port: Port = 0
    token: str = ""

    def __post_init__(self) -> None:
        if self.socket and self.port:
            raise ValueError("admin.socket and admin.port must be set one without the other: there is a single listener")
        if (self.socket or self.port) and not self.token.strip():
            raise ValueError("admin.token must be set if admin.socket or admin.port is set")
        matches = [re.fullmatch(ADMIN_CREDENTIAL, text) for text in self.token.split()]
        if not all(matches):
            raise ValueError(
                "admin.token must be tokens of at least 32 characters (openssl rand -hex 32), each alone or as name:token, "
                "where a name is made of small Latin letters, digits, - and _"
            )
        if len(self.tokens) < len(matches):
            raise ValueError("admin.token must be tokens with different names, if there are several")

    @property
    def is_enabled(self) -> bool:
        return bool(self.socket or self.port)

    @property
    def tokens(self) -> dict[str, str]:
        """By name; a token without one is called `admin`."""
        matches = [re.fullmatch(ADMIN_CREDENTIAL, text) for text in self.token.split()]
        return {match["name"] or "admin": match["secret"] for match in matches if match}


class DatabaseSettings(Section, frozen=True):
    url: str = ""
    connections_max: Annotated[int, msgspec.Meta(ge=1, le=100)] = 8
    acquire_s: Seconds = 2
    statement_s: Seconds = 5

    def __post_init__(self) -> None:
        if self.url and not is_database(self.url):
            raise ValueError(
                "database.url must be such as postgresql://user:password@host:5432/name; in its password write % as %25, "
                "/ as %2F, # as %23, ? as %3F, @ as %40, [ as %5B"
            )


class OpenRouterSettings(Section, frozen=True):
    api_key: Secret = ""
    old_api_keys: Secrets = ""
    proxy: str = ""
    base_url: BaseUrl = "https://openrouter.ai/api/v1"
    management_key: Secret = ""
    default_model: Name = "google/gemini-2.5-flash-lite"
    referer: HeaderText = ""
    title: HeaderText = "GPTutor"
    connect_s: Seconds = 10
    total_s: Seconds = 60
    first_byte_s: Seconds = 60
    idle_s: Seconds = 60
    end_s: Seconds = 5
    connections_max: Count = 2000
    attempts_max: Annotated[int, msgspec.Meta(ge=1, le=10)] = 3
    plain_bytes_max: Annotated[int, msgspec.Meta(ge=65_536)] = 32 * 1024 * 1024
    plain_bytes_total: Annotated[int, msgspec.Meta(ge=65_536)] = 256 * 1024 * 1024
    models_refresh_s: Seconds = 600
    account_poll_s: Seconds = 300
    account_probe_s: Seconds = 15
    credit_warning_usd: Decimal = Decimal(5)

    def __post_init__(self) -> None:
        if not (self.credit_warning_usd.is_finite() and 0 <= self.credit_warning_usd <= 1_000_000):
            raise ValueError(f"openrouter.credit_warning_usd must be a number from 0 to 1000000, not {self.credit_warning_usd}")
        for name, url in (("base_url", self.base_url), ("proxy", self.proxy)):
            if url and not is_address(url, with_path=name == "base_url"):
                raise ValueError(f"openrouter.{name} must be an address such as https://host:port")


def _check_decimal(name: str, value: Decimal, least: Decimal, most: Decimal) -> None:
    if not (value.is_finite() and least <= value <= most):
        raise ValueError(f"billing.{name} must be a number from {least} to {most}, not {value}")
    if name.endswith("_rub"):
        _check_places(f"billing.{name}", value)


def _check_places(name: str, roubles: Decimal) -> None:
    places = -int(roubles.as_tuple().exponent)
    if places > ROUBLE_PLACES:
        raise ValueError(f"{name} must be a number with at most {ROUBLE_PLACES} decimal places, not {places}")


class BillingSettings(Section, frozen=True):
    rub_per_usd: Decimal = Decimal(90)
    cost_rub_per_usd: Decimal = Decimal(0)
    balance_min_rub: Decimal = Decimal(1)
    margin: Decimal = Decimal("1.1")
    overdraft_max_rub: Decimal = Decimal(1)
    output_tokens_min: Count = 16
    output_media_tokens: Count = 8192
    hold_default_rub: Decimal = Decimal(25)
    image_tokens: Count = 8192
    paid_tool_usd: Decimal = Decimal("0.05")
    tool_prompt_tokens: Count = 20_000
    server_tool_steps: Annotated[int, msgspec.Meta(ge=1, le=30)] = 5
    research_searches: Count = 50
    ocr_document_usd: Decimal = Decimal(2)
    cache_write_factor: Decimal = Decimal(2)
    priority_tier_factor: Decimal = Decimal(2)
    provider_price_factor: Decimal = Decimal(3)
    unlisted_prompt_usd: Decimal = Decimal(5)
    unlisted_completion_usd: Decimal = Decimal(25)

    def __post_init__(self) -> None:
        # msgspec has no ranges for Decimal.
        _check_decimal("rub_per_usd", self.rub_per_usd, Decimal("0.0001"), Decimal(100_000))
        _check_decimal("cost_rub_per_usd", self.cost_rub_per_usd, Decimal(0), Decimal(100_000))
        _check_decimal("balance_min_rub", self.balance_min_rub, Decimal(0), Decimal(1_000_000))
        _check_decimal("margin", self.margin, Decimal(1), Decimal(10))
        _check_decimal("overdraft_max_rub", self.overdraft_max_rub, Decimal(0), Decimal(1_000_000))
        _check_decimal("hold_default_rub", self.hold_default_rub, Decimal("0.01"), Decimal(1_000_000))
        _check_decimal("paid_tool_usd", self.paid_tool_usd, Decimal(0), Decimal(1000))
        _check_decimal("ocr_document_usd", self.ocr_document_usd, Decimal(0), Decimal(1000))
        _check_decimal("cache_write_factor", self.cache_write_factor, Decimal(1), Decimal(10))
        _check_decimal("priority_tier_factor", self.priority_tier_factor, Decimal(1), Decimal(10))
        _check_decimal("provider_price_factor", self.provider_price_factor, Decimal(1), Decimal(100))
        _check_decimal("unlisted_prompt_usd", self.unlisted_prompt_usd, Decimal("0.001"), Decimal(10_000))
        _check_decimal("unlisted_completion_usd", self.unlisted_completion_usd, Decimal("0.001"), Decimal(10_000))


class RateLimitSettings(Section, frozen=True):
    chat_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 600
    chat_concurrent_max: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 200
    models_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 300
    sign_ins_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 60
    unauthenticated_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 60
    not_found_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 300
    refused_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 300
    free_models_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 10
    account_pages_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 300
    notifications_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 600
    unknown_payments_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 30


class RelaySettings(Section, frozen=True):
    heartbeat_s: Annotated[float, msgspec.Meta(ge=0.05, le=86_400)] = 15
    buffer_bytes: Annotated[int, msgspec.Meta(ge=4096)] = 256 * 1024
    write_timeout_s: Seconds = 60
    disconnected_drain_s: Seconds = 30
    disconnected_drain_bytes: Count = 1024 * 1024


class RecoverySettings(Section, frozen=True):
    poll_s: Seconds = 1
    lookup_interval_max_s: Annotated[float, msgspec.Meta(ge=1, le=86_400)] = 600
    give_up_s: Annotated[float, msgspec.Meta(gt=0, le=30 * 86_400)] = 86_400
    journal_bytes_max: Annotated[int, msgspec.Meta(ge=1 << 20)] = 1 << 30
    journal_kept_s: Annotated[float, msgspec.Meta(ge=0, le=30 * 86_400)] = 86_400
    journal_kept_bytes_max: Annotated[int, msgspec.Meta(ge=0)] = 32 << 20
    audit_interval_s: Annotated[float, msgspec.Meta(gt=0, le=60)] = 30


class ReconcileSettings(Section, frozen=True):
    difference_usd_max: Decimal = Decimal("0.5")
    difference_percent_max: Decimal = Decimal(2)

    def __post_init__(self) -> None:
        for name, value, most in (
            ("difference_usd_max", self.difference_usd_max, 1_000_000),
            ("difference_percent_max", self.difference_percent_max, 100),
        ):
            if not (value.is_finite() and 0 <= value <= most):
                raise ValueError(f"reconcile.{name} must be a number from 0 to {most}, not {value}")


class SecuritySettings(Section, frozen=True):
    secret_key: str = ""
    old_secret_keys: str = ""


class ErrorSettings(Section, frozen=True):
    form: Literal["auto", "text", "object"] = "auto"


class VkSettings(Section, frozen=True):
    app_id: Annotated[int, msgspec.Meta(ge=0)] = 0
    secret_key: Secret = ""
    launch_age_s: Seconds = 3600
    bonus_rub: Decimal = Decimal(0)

    def __post_init__(self) -> None:
        if bool(self.app_id) != bool(self.secret_key):
            raise ValueError("vk.app_id and vk.secret_key must be set together: VK_APP_ID and VK_SECRET_KEY, or neither")
        if not (self.bonus_rub.is_finite() and 0 <= self.bonus_rub <= 1_000_000):
            raise ValueError(f"vk.bonus_rub must be a number from 0 to 1000000, not {self.bonus_rub}")
        _check_places("vk.bonus_rub", self.bonus_rub)


class YookassaSettings(Section, frozen=True):
    shop_id: Secret = ""
    secret_key: Secret = ""
    return_url: ReturnUrl = ""
    payment_min_rub: Decimal = Decimal(10)
    payment_max_rub: Decimal = Decimal(100_000)
    base_url: BaseUrl = "https://api.yookassa.ru/v3"
    timeout_s: Seconds = 10
    concurrent_max: Count = 8
    test_mode: bool = False
    poll_s: Seconds = 10
    lookup_interval_s: Seconds = 30
    lookup_interval_max_s: Seconds = 3600
    give_up_s: Annotated[float, msgspec.Meta(gt=0, le=60 * 86_400)] = 7 * 86_400

    def __post_init__(self) -> None:
        given = [bool(text) for text in (self.shop_id, self.secret_key, self.return_url)]
        if any(given) and not all(given):
            raise ValueError(
                "yookassa.shop_id, yookassa.secret_key and yookassa.return_url must be set together, or none of them"
            )
        for amount in (self.payment_min_rub, self.payment_max_rub):
            if not (amount.is_finite() and 1 <= amount <= 10_000_000 and amount == round(amount, 2)):
                raise ValueError(f"yookassa.payment_min_rub and payment_max_rub must be roubles and kopecks from 1, not {amount}")
        if self.payment_min_rub > self.payment_max_rub:
            raise ValueError("yookassa.payment_min_rub must be no more than payment_max_rub")

    @property
    def is_set(self) -> bool:
        return bool(self.shop_id)


class AlertSettings(Section, frozen=True):
    url: AlertUrl = ""
    form: Literal["json", "telegram"] = "json"
    token: Secret = ""
    chat_id: Secret = ""
    proxy: str = ""
    timeout_s: Seconds = 10
    poll_s: Annotated[float, msgspec.Meta(ge=0.05, le=3600)] = 10
    disk_free_bytes_min: Annotated[int, msgspec.Meta(ge=0)] = 2 << 30

    def __post_init__(self) -> None:
        if self.form == "telegram" and not (TELEGRAM_TOKEN.fullmatch(self.token) and self.chat_id):
            raise ValueError(
                "alerts.token and alerts.chat_id must be set for Telegram: the token of a bot, such as 123456789:AbC-…, "
                "from @BotFather, and the id of a chat in which the bot may write"
            )
        if self.proxy and not is_address(self.proxy, with_path=False):
            raise ValueError("alerts.proxy must be an address such as http://host:port")


class SimulatorSettings(Section, frozen=True):
    host: Name = "127.0.0.1"
    port: Port = 3002
    word_s: Annotated[float, msgspec.Meta(ge=0, le=60)] = 0.03
    first_word_s: Annotated[float, msgspec.Meta(ge=0, le=60)] = 0.3


class DocsSettings(Section, frozen=True):
    host: Name = "127.0.0.1"
    port: Port = 8080


class Config(Section, frozen=True):
    server: ServerSettings = ServerSettings()
    paths: PathSettings = PathSettings()
    logs: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()
    admin: AdminSettings = AdminSettings()
    database: DatabaseSettings = DatabaseSettings()
    openrouter: OpenRouterSettings = OpenRouterSettings()
    billing: BillingSettings = BillingSettings()
    rate_limit: RateLimitSettings = RateLimitSettings()
    relay: RelaySettings = RelaySettings()
    recovery: RecoverySettings = RecoverySettings()
    reconcile: ReconcileSettings = ReconcileSettings()
    errors: ErrorSettings = ErrorSettings()
    security: SecuritySettings = SecuritySettings()
    vk: VkSettings = VkSettings()
    yookassa: YookassaSettings = YookassaSettings()
    alerts: AlertSettings = AlertSettings()
    simulator: SimulatorSettings = SimulatorSettings()
    docs: DocsSettings = DocsSettings()

    def __post_init__(self) -> None:
        listeners = (
            ("server.port", self.server.host, self.server.port),
            ("metrics.port", self.metrics.host, self.metrics.port),
            ("admin.port", "127.0.0.1", self.admin.port),
        )
        for (one, one_host, one_port), (other, other_host, other_port) in itertools.combinations(listeners, 2):
            if one_port == other_port != 0 and (one_host == other_host or {one_host, other_host} & ALL_ADDRESSES):
                raise ValueError(f"{other} must be another port than {one}, {one_port}: each is a listener of its own")

    @property
    def serves_metrics(self) -> bool:
        """Whether anybody can ask for the metrics."""
        return bool(self.metrics.port) or self.admin.is_enabled

    @property
    def embedded(self) -> bool:
        """Whether the embedded PostgreSQL is used (contract F9)."""
        return not self.database.url

    @property
    def simulated(self) -> bool:
        """Whether the built-in simulator is used in place of OpenRouter (contract F9)."""
        return not self.openrouter.api_key
