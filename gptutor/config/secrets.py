"""The secrets of an installation: 32 bytes each, from the settings, or generated once and stored in `paths.data`."""

import base64
import binascii
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from gptutor.config.schema import Config, ConfigError

KEY_BYTES = 32


def secret_keys(config: Config) -> list[bytes]:
    """The current secret, then the old ones, which only decrypt. Raises ConfigError."""
    old = [_decode(text, "security.old_secret_keys") for text in config.security.old_secret_keys.split()]
    return [secret_key(config), *old]


def secret_key(config: Config) -> bytes:
    """The current secret, from which all other keys of this installation are derived.

    With the embedded database the secret is generated on first use and stored in `paths.data`. Raises ConfigError if DATABASE_URL
    is set and the secret is not: a secret generated on one machine would be missing on the next one.
    """
    text = config.security.secret_key
    if not text:
        if not config.embedded:
            raise ConfigError(
                "GPTUTOR_SECRET_KEY is missing: with DATABASE_URL it must be set, the same on every machine. "
                "Make one with: openssl rand -base64 32"
            )
        path = config.paths.data / "secret-key"
        text = read_or_create_secret(path, lambda: base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode())
    return _decode(text, "GPTUTOR_SECRET_KEY")


def _decode(text: str, name: str) -> bytes:
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{name} must be 32 bytes in base64. Make one with: openssl rand -base64 32")
    return key


def read_or_create_secret(path: Path, make: Callable[[], str]) -> str:
    """The text in the file `path`, which `make()` provides if there is no such file. Only the owner may read the file."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    text = make()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text + "\n")
    return text
