"""Verification of VK launch parameters (contract D2; rows auth-9 to -12)."""

import base64
import hashlib
import hmac
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptutor.integrations.vk import InvalidLaunch, signature, verify

SECRET = "wvl68m4dR1UpLrVRli"
NOW = 1_795_500_000
PUBLISHED = (
    "vk_user_id=494075&vk_app_id=6736218&vk_is_app_user=1&vk_are_notifications_enabled=1&vk_language=ru"
    "&vk_access_token_settings=&vk_platform=android"
)


def token(*, sign: str | None = None, secret: str = SECRET, unsigned: str = "", **changed: str | None) -> str:
    given = {
        "vk_user_id": "494075", "vk_app_id": "6736218", "vk_is_app_user": "1", "vk_language": "ru",
        "vk_access_token_settings": "notify,menu", "vk_platform": "desktop_web", "vk_ts": str(NOW - 60), **changed,
    }  # fmt: skip
    signed = {name: value for name, value in given.items() if value is not None}
    return urlencode(signed) + unsigned + f"&sign={signature(signed, secret) if sign is None else sign}"


def by_keys(keys: str) -> str:
    """Signed as `sign_keys` says."""
    given = {"vk_user_id": "494075", "vk_app_id": "6736218", "vk_ts": str(NOW - 60), "mine": "1"}
    signed = urlencode([(key, given[key]) for key in keys.split(",")])
    digest = hmac.new(SECRET.encode(), signed.encode(), hashlib.sha256).digest()
    return urlencode({**given, "sign_keys": keys, "sign": base64.urlsafe_b64encode(digest).decode().rstrip("=")})


def user_of(text: str, *, app_id: int = 6736218, now: float = NOW) -> int:
    return verify(text, app_id=app_id, secret=SECRET, now=now, age_s_max=3600).user_id


def test_the_published_example_verifies() -> None:
    parameters = dict(pair.split("=") for pair in PUBLISHED.split("&"))
    assert signature(parameters, SECRET) == "htQFduJpLxz7ribXRZpDFUH-XEUhC9rBPTJkjUFEkRA"


@pytest.mark.parametrize(
    "text",
    [
        token(),
        "?" + token(),
        "https://prod-app.example.com/index.html?" + token() + "#home",
        token(unsigned="&utm_source=x&other="),
        token(vk_access_token_settings=""),
        token(vk_new_parameter="", vk_ref="other"),
        "&".join(reversed(token().split("&"))),
        "https://example.com/?debug&" + token(),
        token() + "&",
        "&&" + token().replace("&", "&&"),
        token() + "&hash",
        token() + "&=1",
        token(unsigned="&back=/page?tab=1"),
        "https://example.com/?back=/page?tab=1&" + token(),
        "https://example.com/index.html?lang=ru?" + token(),
        "https://example.com/?" + token() + "&back=https://example.com/?vk_user_id=1",
        "example.com/app?" + token(),
        token(unsigned="&x=%FF&y=%zz&%FF=1&z=%"),
        token(unsigned="&a=1&a=2"),
        token(unsigned="&sign_keys=mine"),
        by_keys("vk_user_id,vk_app_id,vk_ts"),
        "https://example.com/?debug&" + by_keys("vk_ts,vk_app_id,vk_user_id,mine") + "&vk_ref=unsigned",
        token(vk_ts=str(NOW + 59)),
        token(vk_ts=str(NOW - 3600)),
    ],
)
def test_parameters_signed_by_vk_are_accepted(text: str) -> None:
    assert user_of(text) == 494075


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "sign=" + "A" * 43,
        token(sign=""),
        token(sign="A" * 43),
        token().rpartition("&")[0],
        token() + "=",
        token(secret="another"),
        token(vk_app_id="1"),
        token(vk_app_id=None),
        token(vk_user_id=None),
        token(vk_user_id="0"),
        token(vk_user_id="-5"),
        token(vk_user_id="٣"),
        token(vk_ts=None),
        token(vk_ts=""),
        token(vk_ts="soon"),
        token(vk_ts=str(NOW - 3601)),
        token(vk_ts=str(NOW + 61)),
        token() + "&vk_user_id=1",
        token() + "&sign=x",
        token() + "&vk_language=ru",
        token() + "&vk_ref",
        token().replace("vk_user_id", "vk_user_id%5B%5D"),
        token(vk_ref="x").replace("vk_ref=x", "vk_ref=%FF"),
        token() + "&a=1" * 60,
        by_keys("vk_user_id,vk_ts"),
        by_keys("vk_app_id,vk_ts"),
        by_keys("vk_user_id,vk_app_id"),
        by_keys("vk_user_id,vk_app_id,vk_ts").replace("sign_keys=vk_user_id%2Cvk_app_id", "sign_keys=vk_app_id%2Cvk_user_id"),
        by_keys("vk_user_id,vk_app_id,vk_ts").replace("494075", "494076"),
        by_keys("vk_user_id,vk_app_id,vk_ts") + "&sign_keys=vk_ts",
        by_keys("vk_user_id,vk_app_id,vk_ts").replace("&mine=1", "").replace("vk_ts&", "vk_ts%2Cmine&"),
        token(unsigned="&x=" + "y" * 5000),
        token() + "&ключ=1",
    ],
)
def test_everything_else_is_rejected(text: str) -> None:
    with pytest.raises(InvalidLaunch) as caught:
        user_of(text)
    assert "494075" not in str(caught.value)


def test_a_launch_of_another_app_is_rejected() -> None:
    with pytest.raises(InvalidLaunch):
        user_of(token(), app_id=1)


@given(index=st.integers(0, len(token()) - 1), character=st.characters(min_codepoint=33, max_codepoint=126))
def test_no_single_character_can_be_changed(index: int, character: str) -> None:
    whole = token()
    changed = whole[:index] + character + whole[index + 1 :]
    if changed.replace("%2c", "%2C") == whole:  # the same comma, encoded differently
        return
    with pytest.raises(InvalidLaunch):
        user_of(changed)


def test_only_signed_vk_parameters_are_returned() -> None:
    launch = verify(
        by_keys("vk_user_id,vk_app_id,vk_ts,mine") + "&vk_role=admin", app_id=6736218, secret=SECRET, now=NOW, age_s_max=99
    )
    assert set(launch.parameters) == {"vk_user_id", "vk_app_id", "vk_ts"}
