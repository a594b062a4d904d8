"""API keys (contract D4; rows auth-3, auth-6, auth-7)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptutor.money.amounts import AccountId
from gptutor.money.keys import display_prefix, hash_key, make_key, parse_key

KEY = make_key(AccountId(17))


@given(st.integers(1, 2**63 - 1))
def test_a_key_contains_its_account(account: int) -> None:
    key = make_key(AccountId(account))
    claim = parse_key(key)
    assert claim is not None
    assert claim.account_id == account
    assert claim.key_hash == hash_key(key)
    assert len(claim.key_hash) == 32


def test_keys_are_never_the_same() -> None:
    assert len({make_key(AccountId(1)) for _ in range(1000)}) == 1000


@given(st.integers(0, len(KEY) - 1), st.characters(codec="utf-8"))
def test_any_changed_character_is_detected_without_a_look_up(place: int, letter: str) -> None:
    changed = KEY[:place] + letter + KEY[place + 1 :]
    assert changed == KEY or parse_key(changed) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sk-user-",
        pytest.param(KEY.upper(), id="upper case"),
        pytest.param(KEY + " ", id="a space"),
        pytest.param(KEY + "\n", id="a line break"),
        pytest.param(KEY[:-1], id="one character less"),
        pytest.param(KEY.replace("-17-", "-18-"), id="another account"),
        pytest.param(KEY.replace("-17-", "-017-"), id="a leading zero"),
        pytest.param(KEY.replace("-17-", "-0-"), id="account 0"),
        pytest.param(KEY.replace("-17-", "-9999999999999999999-"), id="more than 64 bits"),
        "sk-user-1-' OR pg_sleep(8)--",
        "k" * 1_000_000,
        "sk-user-١-" + "a" * 58,
    ],
)
def test_a_malformed_key_is_rejected(text: str) -> None:
    assert parse_key(text) is None


def test_the_display_prefix_has_four_random_characters() -> None:
    assert display_prefix(KEY) == KEY[: len("sk-user-17-") + 4]
