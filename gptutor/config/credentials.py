"""Secrets in files of their own: each file in `$CREDENTIALS_DIRECTORY` is one setting, named by its file.

systemd sets the variable for units with `LoadCredential=`; the folder is in memory, and only the service's user may read it. In a
container the variable names the folder of its secrets (/run/secrets).
"""

import re
from collections.abc import Mapping
from pathlib import Path

from gptutor.config.schema import ConfigError

DIRECTORY_VARIABLE = "CREDENTIALS_DIRECTORY"
PREFIX = "gptutor_"
"""`LoadCredential=gptutor:<folder>` puts this before the name of each file in the folder."""
BYTES_MAX = 64 * 1024
SETTING = re.compile(r"[A-Z][A-Z0-9_]*")
IGNORED = re.compile(r"\..*|.*(~|\.bak|\.swp)")
"""What editors leave beside a file."""


def read_credentials(environ: Mapping[str, str]) -> dict[str, str]:
    """Name → value; empty without CREDENTIALS_DIRECTORY. Values appear in no message. Raises ConfigError."""
    named = environ.get(DIRECTORY_VARIABLE)
    if not named:
        return {}
    try:
        files = sorted(path for path in Path(named).iterdir() if not IGNORED.fullmatch(path.name) and not path.is_dir())
    except OSError as error:
        raise ConfigError(f"The folder of credentials {named} cannot be read: {error.strerror}.") from error
    credentials: dict[str, str] = {}
    for path in files:
        name = path.name.removeprefix(PREFIX)
        if SETTING.fullmatch(name) is None or name in credentials:
            raise ConfigError(
                f"The credential {path} cannot be used: name the file like a setting in gptutor.env, such as OPENROUTER_API_KEY, "
                "once, or remove it."
            )
        credentials[name] = _read(path)
    return credentials


def _read(path: Path) -> str:
    """Raises ConfigError, without what the file contains."""
    try:
        with path.open("rb") as file:
            content = file.read(BYTES_MAX + 1)
        text = content.decode().strip()
    except OSError as error:
        raise ConfigError(f"The credential {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise ConfigError(f"The credential {path} is not UTF-8: it must be the value itself, as text.") from None
    if not text or len(content) > BYTES_MAX or re.search(r"[\0\r\n]", text):
        fault = "is empty" if not text else "is too large" if len(content) > BYTES_MAX else "is not one line of text"
        raise ConfigError(f"The credential {path} {fault}: it must be the value itself, in one line. Without a value, remove it.")
    return text
