"""Who opened the Mini App: VK's launch parameters and their signature (contract D2). No I/O.

VK signs the parameters whose names begin with `vk_`: sorted by name, form-encoded, HMAC-SHA256 under the app's protected key,
base64url without padding, as the parameter `sign`. Empty values count. What else stands beside them is not signed, and not used.
Source: dev.vk.com, "Launch parameters"; its published example is a test.
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
AHEAD_S_MAX = 60
"""How far VK's clock may be ahead of ours."""
NUMBER = re.compile(r"[1-9][0-9]{0,18}")


class NotSigned(Exception):
    """The token is not one, or not of ours, or not of now; the text is for the log, and has nothing of the token in it."""


class StaleLaunch(NotSigned):
    """VK signed it, but not lately: a page that was left open, not somebody who guesses."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A verified launch. `parameters` are the signed ones, as VK spelled their values."""

    user_id: int
    app_id: int
    at: int
    parameters: Mapping[str, str]


def verify(token: str, *, app_id: int, secret: str, now: float, age_s_max: float) -> Launch:
    """The launch that a query string, or a URL with one, speaks of. `now` is Unix time. Raises NotSigned."""
    parameters = _parameters(token)
    sign = parameters.get("sign", "")
    signed = {name: value for name, value in parameters.items() if name.startswith("vk_")}
    if not hmac.compare_digest(sign.encode(), signature(signed, secret).encode()):
        raise NotSigned("the signature is wrong")
    if signed.get("vk_app_id") != str(app_id):
        raise NotSigned("another app's launch")
    if not NUMBER.fullmatch(signed.get("vk_user_id", "")) or not NUMBER.fullmatch(signed.get("vk_ts", "")):
        raise NotSigned("it names no user, or no time")
    at = int(signed["vk_ts"])
    if not -AHEAD_S_MAX <= now - at <= age_s_max:
        raise StaleLaunch("it is too old, or from the future")
    return Launch(int(signed["vk_user_id"]), app_id, at, signed)


def signature(signed: Mapping[str, str], secret: str) -> str:
    """Of the `vk_` parameters: 43 characters."""
    text = urlencode(sorted(signed.items()))
    digest = hmac.new(secret.encode(), text.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _parameters(token: str) -> dict[str, str]:
    if len(token) > TOKEN_CHARACTERS_MAX or not token.isascii():
        raise NotSigned("it is too long, or not ASCII")
    query = token.partition("#")[0].rpartition("?")[2]
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=PARAMETERS_MAX, errors="strict")
    except ValueError as error:
        raise NotSigned("it is no query string") from error
    if len(dict(pairs)) != len(pairs):
        raise NotSigned("a parameter stands twice")
    return dict(pairs)
