"""VK Mini Apps launch parameters: verifying their signature, which proves who opened the app (contract D2). No I/O.

VK signs the parameters whose names begin with `vk_`: sorted by name, form-encoded, HMAC-SHA256 with the app's secret key,
base64url without padding, sent as the parameter `sign`. Parameters with empty values are signed too. All other parameters are
unsigned, and are ignored. Source: dev.vk.com, "Launch parameters"; its published example is a test.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

TOKEN_CHARACTERS_MAX = 4096
PARAMETERS_MAX = 64
CLOCK_SKEW_S_MAX = 60
"""How far VK's clock may be ahead of the local one."""
POSITIVE_INTEGER = re.compile(r"[1-9][0-9]{0,18}")


class InvalidLaunch(Exception):
    """The token is malformed, not signed by VK for this app, or expired. The message, for the log, does not quote it."""


class ExpiredLaunch(InvalidLaunch):
    """Signed by VK, but too long ago: probably a page left open, not an attempt to guess a token."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Verified launch parameters. `at` is the Unix time of the launch, `parameters` are all signed parameters, decoded."""

    user_id: int
    app_id: int
    at: int
    parameters: Mapping[str, str]


def verify(token: str, *, app_id: int, secret: str, now: float, age_s_max: float) -> Launch:
    """Verifies launch parameters, given as a query string or as a URL with one. `now` is Unix time. Raises InvalidLaunch."""
    parameters = _parameters(token)
    sign = parameters.get("sign", "")
    signed = {name: value for name, value in parameters.items() if name.startswith("vk_")}
    if not hmac.compare_digest(sign.encode(), signature(signed, secret).encode()):
        raise InvalidLaunch("the signature is wrong")
    if signed.get("vk_app_id") != str(app_id):
        raise InvalidLaunch("the launch is of another app")
    if not POSITIVE_INTEGER.fullmatch(signed.get("vk_user_id", "")) or not POSITIVE_INTEGER.fullmatch(signed.get("vk_ts", "")):
        raise InvalidLaunch("vk_user_id or vk_ts is missing or invalid")
    at = int(signed["vk_ts"])
    if not -CLOCK_SKEW_S_MAX <= now - at <= age_s_max:
        raise ExpiredLaunch("vk_ts is too old or in the future")
    return Launch(int(signed["vk_user_id"]), app_id, at, signed)


def signature(signed: Mapping[str, str], secret: str) -> str:
    """The value of `sign` for these `vk_` parameters: 43 characters."""
    text = urlencode(sorted(signed.items()))
    digest = hmac.new(secret.encode(), text.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _parameters(token: str) -> dict[str, str]:
    if len(token) > TOKEN_CHARACTERS_MAX or not token.isascii():
        raise InvalidLaunch("the token is too long or not ASCII")
    query = token.partition("#")[0].rpartition("?")[2]
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=PARAMETERS_MAX, errors="strict")
    except ValueError as error:
        raise InvalidLaunch("the token is not a query string") from error
    if len(dict(pairs)) != len(pairs):
        raise InvalidLaunch("a parameter is repeated")
    return dict(pairs)
