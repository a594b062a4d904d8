"""API keys: `sk-user-<account>-<58 characters>`.

The account stands in the key, so that a look-up names the row it wants and every statement can be sent to the account's own
shard. The characters are base32 of 256 random bits and a CRC-32 of everything before it: a typo or a scanner's guess is
refused without asking the database. The database keeps SHA-256 of the whole key; at 256 random bits no slower hash is needed.
"""

import base64
import hashlib
import re
import secrets
import zlib

import msgspec

from gptutor.money.amounts import AccountId

RANDOM_BYTES = 32
CHECK_BYTES = 4
FORM = re.compile(r"sk-user-([1-9][0-9]{0,18})-([a-z2-7]{58})")
ACCOUNT_MAX = 2**63 - 1
DIGITS = str.maketrans("abcdefghijklmnopqrstuvwxyz234567", "0123456789abcdefghijklmnopqrstuv")
UNUSED_BITS = 58 * 5 - (RANDOM_BYTES + CHECK_BYTES) * 8


class KeyClaim(msgspec.Struct, frozen=True):
    """A well-formed key: the account that it names, and the hash that proves it."""

    account_id: AccountId
    key_hash: bytes


def make_key(account_id: AccountId) -> str:
    body = secrets.token_bytes(RANDOM_BYTES)
    return f"sk-user-{account_id}-{_encode(body + _check(account_id, body))}"


def parse_key(text: str) -> KeyClaim | None:
    """The claim that a key makes, or None if no key of ours is spelled so."""
    form = FORM.fullmatch(text)
    if form is None:
        return None
    account_id = AccountId(int(form[1]))
    # Python's own base32 goes character by character; `int` reads 32 digits, if they are 0-9a-v, in one go.
    bits = int(form[2].translate(DIGITS), 32)
    decoded = (bits >> UNUSED_BITS).to_bytes(RANDOM_BYTES + CHECK_BYTES, "big")
    body, check = decoded[:RANDOM_BYTES], decoded[RANDOM_BYTES:]
    # Bits that are not used must be none: otherwise a key would have other spellings.
    if account_id > ACCOUNT_MAX or check != _check(account_id, body) or bits & (1 << UNUSED_BITS) - 1:
        return None
    return KeyClaim(account_id, hash_key(text))


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def shown(key: str) -> str:
    """The part of a key that may be shown and logged: enough to recognise it, useless to a thief."""
    prefix, _, secret = key.rpartition("-")
    return f"{prefix}-{secret[:4]}"


def _check(account_id: AccountId, body: bytes) -> bytes:
    return zlib.crc32(b"%d-%s" % (account_id, body)).to_bytes(CHECK_BYTES, "big")


def _encode(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()
