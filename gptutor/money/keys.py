"""API keys: `sk-user-<account>-<58 characters>`.

A key contains its account's id, so that a look-up is by primary key and every statement can be sent to the account's own shard.
The characters are base32 of 256 random bits and of a CRC-32 of all that precedes it: a typo or a random guess is rejected without
asking the database. The database stores the SHA-256 of the whole key; with 256 random bits no slower hash is needed.
"""

import base64
import hashlib
import re
import secrets
import zlib

import msgspec

from gptutor.money.amounts import AccountId

RANDOM_BYTES = 32
CHECKSUM_BYTES = 4
KEY_PATTERN = re.compile(r"sk-user-([1-9][0-9]{0,18})-([a-z2-7]{58})")
ACCOUNT_MAX = 2**63 - 1
BASE32_TO_INT_DIGITS = str.maketrans("abcdefghijklmnopqrstuvwxyz234567", "0123456789abcdefghijklmnopqrstuv")
UNUSED_BITS = 58 * 5 - (RANDOM_BYTES + CHECKSUM_BYTES) * 8


class KeyClaim(msgspec.Struct, frozen=True):
    """The content of a well-formed key: the account id in it, and the SHA-256 of the key, which the database checks."""

    account_id: AccountId
    key_hash: bytes


def make_key(account_id: AccountId) -> str:
    random_bytes = secrets.token_bytes(RANDOM_BYTES)
    return f"sk-user-{account_id}-{_base32(random_bytes + _checksum(account_id, random_bytes))}"


def parse_key(text: str) -> KeyClaim | None:
    """The account id and hash of a key; None if the text is not well-formed or its checksum is wrong."""
    match = KEY_PATTERN.fullmatch(text)
    if match is None:
        return None
    account_id = AccountId(int(match[1]))
    # `base64.b32decode` is a loop in Python; `int` with base 32 is one call in C, and wants the digits 0-9a-v.
    bits = int(match[2].translate(BASE32_TO_INT_DIGITS), 32)
    decoded = (bits >> UNUSED_BITS).to_bytes(RANDOM_BYTES + CHECKSUM_BYTES, "big")
    random_bytes, checksum = decoded[:RANDOM_BYTES], decoded[RANDOM_BYTES:]
    # The unused bits at the end must be zero: otherwise several texts would be the same key.
    if account_id > ACCOUNT_MAX or checksum != _checksum(account_id, random_bytes) or bits & (1 << UNUSED_BITS) - 1:
        return None
    return KeyClaim(account_id, hash_key(text))


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def display_prefix(key: str) -> str:
    """The part of a key that may be shown and logged: enough to recognise the key, useless to a thief."""
    prefix, _, secret = key.rpartition("-")
    return f"{prefix}-{secret[:4]}"


def _checksum(account_id: AccountId, random_bytes: bytes) -> bytes:
    return zlib.crc32(b"%d-%s" % (account_id, random_bytes)).to_bytes(CHECKSUM_BYTES, "big")


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()
