"""Copies of API keys that can be shown again, and are useless without a secret that is not in the database.

AES-256-GCM under a key derived from GPTUTOR_SECRET_KEY for this purpose alone. A copy is bound to its row, by the account and the
key's hash as associated data: moved to another row it does not open. Each copy names the secret that it was made with, so that
secrets can be changed while copies of the old one still open (`gptutor rekey`).
"""

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from gptutor.money.amounts import AccountId

NONCE_BYTES = 12
PURPOSE = b"gptutor key copies"


class Unreadable(Exception):
    """No secret that is known opens this copy, or it is not the copy of this row."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A key's encrypted copy: nonce, ciphertext and tag; and the name of the secret that opens it."""

    data: bytes
    secret_id: str


class Vault:
    """`secrets` are 32 bytes each: the first seals, all open."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        keys = [hmac.new(secret, PURPOSE, hashlib.sha256).digest() for secret in secrets]
        self._ciphers = {hashlib.sha256(key).hexdigest()[:16]: AESGCM(key) for key in keys}
        self.secret_id = next(iter(self._ciphers))

    def seal(self, account_id: AccountId, key_hash: bytes, key: str) -> Sealed:
        nonce = os.urandom(NONCE_BYTES)
        sealed = self._ciphers[self.secret_id].encrypt(nonce, key.encode(), _row(account_id, key_hash))
        return Sealed(nonce + sealed, self.secret_id)

    def open(self, account_id: AccountId, key_hash: bytes, sealed: Sealed) -> str:
        """The key. Raises Unreadable."""
        try:
            cipher = self._ciphers[sealed.secret_id]
            key = cipher.decrypt(sealed.data[:NONCE_BYTES], sealed.data[NONCE_BYTES:], _row(account_id, key_hash))
        except (KeyError, InvalidTag, ValueError) as error:
            raise Unreadable(sealed.secret_id) from error
        return key.decode()


class ClosedVault(Vault):
    """Without a secret nothing is sealed or opened: `error` says why, to whoever tries."""

    def __init__(self, error: Exception) -> None:
        super().__init__([b""])
        self._error = error

    def seal(self, account_id: AccountId, key_hash: bytes, key: str) -> Sealed:
        raise self._error

    def open(self, account_id: AccountId, key_hash: bytes, sealed: Sealed) -> str:
        raise self._error


def _row(account_id: AccountId, key_hash: bytes) -> bytes:
    return b"%d:%b" % (account_id, key_hash)
