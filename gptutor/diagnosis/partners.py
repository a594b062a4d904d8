"""What the service depends on elsewhere: OpenRouter with its key, credit and clock, VK's signatures, YooKassa."""

import datetime
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from decimal import Decimal
from urllib.parse import urlencode, urlsplit

import msgspec

from gptutor.config.schema import OpenRouterSettings
from gptutor.diagnosis.findings import Finding, Installation, error, ok, warning
from gptutor.integrations import vk, yookassa
from gptutor.openrouter.account_state import read_credit, read_key
from gptutor.openrouter.clock import SKEW_S_MAX
from gptutor.openrouter.errors import UpstreamError
from gptutor.openrouter.service import OpenRouterService, UpstreamLimits, connected
from gptutor.telemetry.metrics import CLOCK_SKEW

EXPIRES_SOON_DAYS = 14
SKEW_S = 5
VK_SECRET = re.compile(r"[A-Za-z0-9]{15,40}")
LIMITS = UpstreamLimits(connect_s=5, total_s=10, first_byte_s=10, idle_s=10, end_s=10, attempts_max=1)


async def openrouter(installation: Installation) -> Sequence[Finding]:
    """Reachability, by the proxy of the settings too; the key, its limit and its end; the account's credit; the clock."""
    config = installation.config
    if config.simulated:
        return [ok("OPENROUTER_API_KEY is not set: OpenRouter is not asked.")]
    settings = config.openrouter
    began = time.perf_counter()
    try:
        async with _connected(settings, settings.api_key) as service:
            document = await service.get("/key")
    except UpstreamError as failure:
        return [unreachable(failure, settings)]
    took_s = time.perf_counter() - began
    try:
        key, left_usd = msgspec.json.decode(document, type=_KeyResponse).data, read_key(document).limit_left_usd
    except (ValueError, RecursionError):
        return [error(f"{settings.base_url}/key is not OpenRouter's answer: check OPENROUTER_BASE_URL.")]
    findings = [ok(f"OpenRouter accepts the key, and answers in {took_s * 1000:.0f} ms{_by_proxy(settings)}.")]
    findings += _limit(left_usd, settings)
    findings += key_findings(key, datetime.datetime.now(datetime.UTC))
    if settings.management_key:
        findings += await _credit(settings)
    return findings


def unreachable(failure: UpstreamError, settings: OpenRouterSettings) -> Finding:
    status = failure.failure.status
    if status == 401:
        return error("OpenRouter rejects OPENROUTER_API_KEY (401): create a key at openrouter.ai/settings/keys, and set it.")
    if status in (402, 403):
        return error(f"OpenRouter refuses the key ({status}): add credit, or raise the limit of the key.")
    if status:
        return error(f"OpenRouter answers with status {status}: try again, and see status.openrouter.ai.")
    advice = "is the proxy running?" if settings.proxy else "check DNS and the firewall, or set openrouter.proxy."
    return error(
        f"OpenRouter cannot be reached at {urlsplit(settings.base_url).hostname}{_by_proxy(settings)} ({failure}): {advice}"
    )


def _by_proxy(settings: OpenRouterSettings) -> str:
    """Without the proxy's password."""
    proxy = urlsplit(settings.proxy)
    return f" by the proxy {proxy.hostname}:{proxy.port or 80}" if settings.proxy else ""


class _Key(msgspec.Struct):
    is_free_tier: bool | None = None
    expires_at: str | None = None


class _KeyResponse(msgspec.Struct):
    data: _Key


def _limit(left_usd: Decimal | None, settings: OpenRouterSettings) -> list[Finding]:
    """`left_usd` is negative if the last requests cost more than was left."""
    if left_usd is None:
        return [warning("The key has no limit at OpenRouter: give it one that you can afford to lose.")]
    if left_usd <= 0:
        return [error("The limit of the key is used up: raise it at openrouter.ai/settings/keys.")]
    if left_usd < settings.credit_warning_usd:
        return [warning(f"Only {left_usd} dollars are left of the key's limit: raise it at openrouter.ai/settings/keys.")]
    return [ok(f"{left_usd} dollars are left of the key's limit.")]


def key_findings(key: _Key, now: datetime.datetime) -> list[Finding]:
    findings: list[Finding] = []
    if key.is_free_tier:
        findings.append(warning("OpenRouter's account has never bought credit: only free models answer. Buy credit."))
    if key.expires_at:
        try:
            days = (datetime.datetime.fromisoformat(key.expires_at) - now).days
        except (ValueError, TypeError):
            return findings
        if days < EXPIRES_SOON_DAYS:
            findings.append((error if days < 0 else warning)(f"The key of OpenRouter expires in {days} days: create a new one."))
    return findings


async def _credit(settings: OpenRouterSettings) -> list[Finding]:
    """Of the whole account."""
    try:
        async with _connected(settings, settings.management_key) as service:
            left_usd = read_credit(await service.get("/credits"))
    except (UpstreamError, ValueError):
        return [warning("openrouter.management_key does not show the credit of the account: set a key of kind management.")]
    if left_usd <= 0:
        return [error("OpenRouter's account has no credit left: buy some at openrouter.ai/settings/credits.")]
    told = f"{left_usd} dollars of credit are left at OpenRouter"
    is_low = left_usd < settings.credit_warning_usd
    return [warning(f"Only {told}: buy more, or set up auto top-up.") if is_low else ok(f"{told}.")]


async def clock(installation: Installation) -> Sequence[Finding]:
    """This machine's clock against the header `Date` of OpenRouter, which has whole seconds."""
    zone = time.strftime("%Z")
    told = f"The time zone of this machine is {zone}; logs, days and limits are counted in UTC."
    settings = installation.config.openrouter
    if installation.config.simulated:
        return [ok(told)]
    CLOCK_SKEW.set(0)
    try:
        async with _connected(settings, settings.api_key) as service:
            await service.get("/key")
    except UpstreamError:
        return [ok(told), warning("The clock could not be compared with OpenRouter's.")]
    (metric,) = CLOCK_SKEW.collect()
    return [ok(told), *skew_findings(metric.samples[0].value)]


def skew_findings(skew_s: float) -> list[Finding]:
    if abs(skew_s) <= SKEW_S:
        return [ok("The clock agrees with OpenRouter's.")]
    side = "ahead of" if skew_s > 0 else "behind"
    told = f"The clock is {abs(skew_s):.0f} s {side} OpenRouter's: run NTP (timedatectl set-ntp true)."
    return [error(told) if abs(skew_s) > SKEW_S_MAX else warning(told)]


def _connected(settings: OpenRouterSettings, key: str) -> AbstractAsyncContextManager[OpenRouterService]:
    return connected(settings.base_url, key, LIMITS, referer="", title="", connections_max=1, proxy=settings.proxy)


async def vk_secret(installation: Installation) -> Sequence[Finding]:
    """The form of the protected key; a launch that is signed with it must be accepted."""
    settings = installation.config.vk
    if not settings.app_id:
        return [ok("Sign-in by VK is disabled: VK_APP_ID is not set.")]
    now = time.time()
    launch = {"vk_app_id": f"{settings.app_id}", "vk_user_id": "1", "vk_ts": f"{now:.0f}"}
    token = urlencode({**launch, "sign": vk.signature(launch, settings.secret_key)})
    try:
        vk.verify(token, app_id=settings.app_id, secret=settings.secret_key, now=now, age_s_max=settings.launch_age_s)
    except vk.InvalidLaunch as failure:
        return [error(f"A launch signed with VK_SECRET_KEY is rejected ({failure}): set the app's id and its protected key.")]
    if not VK_SECRET.fullmatch(settings.secret_key):
        return [
            warning(
                "VK_SECRET_KEY has not the form of a protected key (about 20 letters and digits; the service key is longer): "
                "copy it again from the settings of the Mini App."
            )
        ]
    return [ok("A launch signed with VK_SECRET_KEY is accepted; whether it is the right key is seen at the first sign-in.")]


async def payments(installation: Installation) -> Sequence[Finding]:
    """Asks for a payment that nobody has made: YooKassa answers 404 to the shop, and 401 to anybody else."""
    settings = installation.config.yookassa
    if not settings.is_set:
        return [ok("Payments are disabled: yookassa.shop_id is not set.")]
    try:
        async with yookassa.connected(
            shop_id=settings.shop_id,
            secret_key=settings.secret_key,
            base_url=settings.base_url,
            return_url=settings.return_url,
            timeout_s=min(settings.timeout_s, 10),
        ) as client:
            await client.payment(str(uuid.uuid4()))
    except yookassa.YooKassaUnavailable as failure:
        if "status 401" in str(failure) or "status 403" in str(failure):
            return [error("YooKassa rejects the shop: check yookassa.shop_id and yookassa.secret_key.")]
        return [error(f"YooKassa does not answer as it should ({failure}): payments are credited later, by the look-ups.")]
    return [ok("YooKassa accepts the shop and its secret key.")]
