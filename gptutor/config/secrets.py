"""The secrets of an installation: 32 bytes each, from the settings, or made once and kept beside the embedded database."""

import base64
import binascii
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from gptutor.config.schema import Config, ConfigError

KEY_BYTES = 32


def secret_keys(config: Config) -> list[bytes]:
    """The secret of today, and those before it, which still open what was sealed with them. Raises ConfigError."""
    old = [_decoded(text, "security.old_secret_keys") for text in config.security.old_secret_keys.split()]
    return [secret_key(config), *old]


def secret_key(config: Config) -> bytes:
    """The secret from which all others of this installation derive.

    With the embedded database it is made on first use and kept in `paths.data`. Raises ConfigError where an own database is
    configured without a key: a key on one machine's disk would not survive a second machine.
    """
    text = config.security.secret_key
    if not text:
        if not config.embedded:
            raise ConfigError(
                "GPTUTOR_SECRET_KEY is missing: with a database of your own it must be set, the same on every "
                "machine. Make one with: openssl rand -base64 32"
            )
        kept = config.paths.data / "secret-key"
        text = kept_secret(kept, lambda: base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode())
    return _decoded(text, "GPTUTOR_SECRET_KEY")


def _decoded(text: str, name: str) -> bytes:
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{name} must be 32 bytes in base64. Make one with: openssl rand -base64 32")
    return key


def kept_secret(path: Path, make: Callable[[], str]) -> str:
    """The text kept in `path`, made by `make()` on first use; readable by its owner alone."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    text = make()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text + "\n")
    return text
