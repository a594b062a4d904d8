"""Encrypted copies of API keys: a key can be shown again, and a copy is useless without a secret that is not in the database.

AES-256-GCM under a key derived from GPTUTOR_SECRET_KEY for this purpose alone. A copy is bound to its row by associated data, the
account and the key's hash: moved to another row it cannot be decrypted. Each copy names the secret that encrypted it, so that the
secret can be replaced while copies under the old one can still be decrypted (`gptutor rekey`).
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


class DecryptionFailed(Exception):
    """No known secret decrypts this copy, or the copy belongs to another row."""


@dataclass(frozen=True, slots=True)
class EncryptedKey:
    """An API key's encrypted copy: nonce, ciphertext and tag; and the id of the secret that decrypts it."""

    data: bytes
    secret_id: str


class Vault:
    """Encrypts and decrypts API keys. `secrets` are 32 bytes each: the first one encrypts, all of them decrypt."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        keys = [hmac.new(secret, PURPOSE, hashlib.sha256).digest() for secret in secrets]
        self._ciphers = {hashlib.sha256(key).hexdigest()[:16]: AESGCM(key) for key in keys}
        self.secret_id = next(iter(self._ciphers))

    def encrypt(self, account_id: AccountId, key_hash: bytes, key: str) -> EncryptedKey:
        nonce = os.urandom(NONCE_BYTES)
        ciphertext = self._ciphers[self.secret_id].encrypt(nonce, key.encode(), _associated_data(account_id, key_hash))
        return EncryptedKey(nonce + ciphertext, self.secret_id)

    def decrypt(self, account_id: AccountId, key_hash: bytes, encrypted: EncryptedKey) -> str:
        """The key. Raises DecryptionFailed."""
        nonce, ciphertext = encrypted.data[:NONCE_BYTES], encrypted.data[NONCE_BYTES:]
        try:
            key = self._ciphers[encrypted.secret_id].decrypt(nonce, ciphertext, _associated_data(account_id, key_hash))
        except (KeyError, InvalidTag, ValueError) as error:
            raise DecryptionFailed(encrypted.secret_id) from error
        return key.decode()


class VaultWithoutSecret(Vault):
    """Stands in where no secret is configured: every use raises `error`, which says why there is none."""

    def __init__(self, error: Exception) -> None:
        super().__init__([b""])
        self._error = error

    def encrypt(self, account_id: AccountId, key_hash: bytes, key: str) -> EncryptedKey:
        raise self._error

    def decrypt(self, account_id: AccountId, key_hash: bytes, encrypted: EncryptedKey) -> str:
        raise self._error


def _associated_data(account_id: AccountId, key_hash: bytes) -> bytes:
    return b"%d:%b" % (account_id, key_hash)
