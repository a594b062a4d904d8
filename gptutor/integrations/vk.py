"""VK Mini Apps launch parameters: verifying their signature, which proves who opened the app (contract D2). No I/O.

VK signs the parameters whose names begin with `vk_`: sorted by name, form-encoded, HMAC-SHA256 with the app's secret key,
base64url without padding, sent as the parameter `sign`. Parameters with empty values are signed too. Where VK sends `sign_keys`,
the parameters named there are signed, in that order. All other parameters are the app's own: they are unsigned, need not be
well-formed, and are ignored. Source: dev.vk.com, "Launch parameters"; its published example is a test.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_plus, urlencode

TOKEN_CHARACTERS_MAX = 4096
PARAMETERS_MAX = 64
CLOCK_SKEW_S_MAX = 60
"""How far VK's clock may be ahead of the local one."""
PREFIX = "vk_"
SIGN = "sign"
SIGN_KEYS = "sign_keys"
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
    signed = _signed_parameters(token, secret)
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
    return _signature(sorted(signed.items()), secret)


def _signature(pairs: Sequence[tuple[str, str]], secret: str) -> str:
    digest = hmac.new(secret.encode(), urlencode(pairs).encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _signed_parameters(token: str, secret: str) -> dict[str, str]:
    """The `vk_` parameters that VK has signed. Raises InvalidLaunch."""
    if len(token) > TOKEN_CHARACTERS_MAX or not token.isascii():
        raise InvalidLaunch("the token is too long or not ASCII")
    text = token.partition("#")[0]
    # A query string alone, the query of a URL, or one that the app's own query precedes: the signature tells which it is.
    for query in {text: None, text.partition("?")[2]: None, text.rpartition("?")[2]: None}:
        parameters = _parameters(query)
        sign = parameters.pop(SIGN, "")
        keys = parameters.pop(SIGN_KEYS, None)
        signed = {name: value for name, value in parameters.items() if name.startswith(PREFIX)}
        if hmac.compare_digest(sign.encode(), signature(signed, secret).encode()):
            return signed
        if keys is not None and all(key in parameters for key in keys.split(",")):
            named = [(key, parameters[key]) for key in keys.split(",")]
            if hmac.compare_digest(sign.encode(), _signature(named, secret).encode()):
                return {key: value for key, value in named if key.startswith(PREFIX)}
    raise InvalidLaunch("the signature is wrong")


def _parameters(query: str) -> dict[str, str]:
    """Decoded. Only those that may be signed must be well-formed and unique. Raises InvalidLaunch."""
    parameters: dict[str, str] = {}
    fields = query.split("&")
    if len(fields) > PARAMETERS_MAX:
        raise InvalidLaunch("there are too many parameters")
    for field in fields:
        name, _, value = field.partition("=")
        name = unquote_plus(name)
        is_own = name.startswith(PREFIX) or name in (SIGN, SIGN_KEYS)
        if is_own and name in parameters:
            raise InvalidLaunch("a parameter is repeated")
        try:
            parameters[name] = unquote_plus(value, errors="strict" if is_own else "replace")
        except UnicodeDecodeError as error:
            raise InvalidLaunch("a parameter is not UTF-8") from error
    return parameters
