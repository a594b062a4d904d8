"""`gptutor` for the administrator of an installed service: root reads the secrets, and then becomes the service's user.

Started by /usr/local/bin/gptutor. The files that a command writes belong to the service, so that it can write them as well.
"""

import os
import pwd
import sys
from collections.abc import MutableMapping

from gptutor.cli import console
from gptutor.cli.installation import CREDENTIALS, SETTINGS, USER
from gptutor.config.credentials import DIRECTORY_VARIABLE, read_credentials
from gptutor.config.load import CONFIG_PATH_VARIABLE, PROXY_VARIABLES, SHORT_NAMES
from gptutor.config.schema import ConfigError

AS_ROOT = "install-service"


def main() -> None:
    """The entry point. Exits with a sentence if this is not root, or the secrets cannot be read."""
    from gptutor.cli.main import main as command

    if sys.argv[1:2] != [AS_ROOT]:
        try:
            become_service_user(os.environ)
        except (ConfigError, OSError, KeyError) as error:
            console.fail(f"The service's user and secrets cannot be used: {error}")
    sys.argv[0] = "gptutor"
    command()


def become_service_user(environ: MutableMapping[str, str]) -> None:
    """Sets the settings of the service in `environ`, and gives up root. Raises ConfigError, OSError, KeyError.

    Secrets do not get into /proc/<pid>/environ: that shows what a process was started with.
    """
    if os.geteuid() != 0:
        console.fail("Run this with sudo: only root can read the service's secrets.")
    who = _caller(environ)
    user = pwd.getpwnam(USER)
    for name in [name for name in environ if name.startswith("GPTUTOR_") or name.upper() in (*SHORT_NAMES, *PROXY_VARIABLES)]:
        del environ[name]  # the service does not have it
    environ.update(read_credentials({DIRECTORY_VARIABLE: CREDENTIALS}))
    environ.update({CONFIG_PATH_VARIABLE: f"{SETTINGS}/config.yaml", "HOME": user.pw_dir, "USER": USER, "LOGNAME": USER})
    environ.pop(DIRECTORY_VARIABLE, None)
    os.umask(0o027)
    os.initgroups(USER, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    console.caller = who


def _caller(environ: MutableMapping[str, str]) -> str:
    """Who became root: sudo says so, and only root can get here."""
    try:
        return pwd.getpwuid(int(environ["SUDO_UID"])).pw_name
    except (KeyError, ValueError):
        return console.os_user()


if __name__ == "__main__":
    main()
