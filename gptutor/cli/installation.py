"""The plan of an installation: from a clone, or from an installed release, to the steps that make this machine run it.

What is where: `<prefix>/releases/<name>` has each release with its environment, `<prefix>/current` leads to the one that runs;
/etc/gptutor has the settings and the secrets, /var/lib/gptutor and /var/log/gptutor the data and the logs.
"""

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptutor import __version__
from gptutor.cli.installation_steps import (
    MARKER,
    SOURCES,
    Command,
    Copy,
    File,
    Folder,
    InstallError,
    Link,
    Machine,
    Prune,
    Release,
    Running,
    Step,
    User,
    digest,
)
from gptutor.config.files import ENV_FILE, read_env_file, read_settings
from gptutor.config.load import CONFIG_PATH_VARIABLE, PROXY_VARIABLES, SHORT_NAMES, load, settings_of
from gptutor.config.messages import SECRETS
from gptutor.config.schema import Config

UNIT = "gptutor"
USER = "gptutor"
PREFIX = "/opt/gptutor"
"""The prefix that deploy/gptutor.service has."""
SETTINGS = "/etc/gptutor"
CREDENTIALS = f"{SETTINGS}/credentials"
DATA, LOGS = "/var/lib/gptutor", "/var/log/gptutor"
WRAPPER = "/usr/local/bin/gptutor"
UNIT_FILE = f"/etc/systemd/system/{UNIT}.service"
RELEASES_KEPT = 3
CONFIG = f"""\
# Settings of this machine: only what differs from the defaults. All settings, with units and reasons: %s/current/config.yaml
# Secrets are not here, but in {CREDENTIALS}: a file for each, named like the variable. After a change of settings:
# systemctl reload gptutor; of a secret: systemctl restart gptutor.
paths:
  data: {DATA}
  logs: {LOGS}
"""
WRAPPER_TEXT = """\
#!/bin/sh
# The command line of the installed service: with its settings and secrets, as its user. The name of the calling user is kept for
# the audit lines.
test "$(id -u)" = 0 || exec sudo -- "$0" "$@"
exec %s/current/.venv/bin/python -I -m gptutor.cli.as_service "$@"
"""


@dataclass(frozen=True, slots=True)
class Installation:
    """What is wanted."""

    source: Path
    """A clone, or the folder of a release."""
    prefix: str = PREFIX
    release: str | None = None
    """The name of an installed release to go back to; without it, what `source` has is installed."""
    data_from: Path | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What the machine has of a service before."""

    folder: Path | None
    """Where the unit that runs now keeps its files, unless it is one of ours."""
    settings: Mapping[str, str] = field(repr=False)
    """Name → value, to be taken over: of that service, or of the clone's gptutor.env."""


@dataclass(frozen=True, slots=True)
class Plan:
    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    """What the operator should know or do, afterwards."""


def look(wanted: Installation, machine: Machine) -> Found:
    """Raises ConfigError."""
    unit = machine.output(["systemctl", "show", UNIT, "--property=WorkingDirectory", "--value"]) if machine.is_this_one else ""
    folder = Path(unit.strip()) if unit.strip() not in ("", DATA) else None
    if machine.path(f"{SETTINGS}/{ENV_FILE}").exists():
        return Found(folder, {})
    return Found(folder, settings_before(folder or wanted.source))


def settings_before(folder: Path) -> dict[str, str]:
    """What a service in this folder is set to, by variables: gptutor.env, and what config.yaml changes. Raises ConfigError."""
    given = read_env_file(folder / ENV_FILE)
    path = Path(folder, given.pop(CONFIG_PATH_VARIABLE, "config.yaml"))
    changed: dict[str, str] = {}
    if path.is_file():
        texts, _ = read_settings(path)
        config = load({CONFIG_PATH_VARIABLE: str(path)})
        for section, keys in texts.items():
            ours, default = getattr(config, section), getattr(Config(), section)
            changed |= {
                f"GPTUTOR_{section}__{key}".upper(): str(text)
                for key, text in keys.items()
                if getattr(ours, key) != getattr(default, key)
            }
    changed |= given
    named = settings_of(changed, f" in {ENV_FILE}")
    return {
        name: value
        for name, value in changed.items()
        if (name in named and not named[name].startswith("paths.")) or name.upper() in PROXY_VARIABLES
    }


def is_secret(name: str) -> bool:
    """Whether a variable's value is kept as a credential: also a proxy, whose address may have a password."""
    return name.upper() == "HTTPS_PROXY" or settings_of({name: ""}, "").get(name) in SECRETS


def make_plan(wanted: Installation, machine: Machine, found: Found) -> Plan:
    """Raises InstallError, ConfigError."""
    release = chosen_release(wanted, machine)
    current = Link(f"{wanted.prefix}/current", f"releases/{Path(release.path).name}")
    before = _link_now(current, machine)
    files = list(_settings(wanted, machine, found))
    missing = _missing(machine, found)
    unit = File(UNIT_FILE, _unit_text(wanted, release, machine), "root", "root", 0o644)
    steps: list[Step] = [
        User(USER, DATA),
        Folder(wanted.prefix, "root", "root", 0o755),
        Folder(f"{wanted.prefix}/releases", "root", "root", 0o755),
        release,
        *_data(wanted, machine, found),
        Folder(DATA, USER, USER, 0o750, whole=True),
        Folder(LOGS, USER, USER, 0o750, whole=True),
        Folder(SETTINGS, "root", USER, 0o750),
        Folder(CREDENTIALS, "root", "root", 0o700),
        *files,
        File(WRAPPER, WRAPPER_TEXT % wanted.prefix, "root", "root", 0o755),
    ]
    reads = Command("systemd reads its units", ("systemctl", "daemon-reload"), (unit,))
    running = Running(UNIT, (current, unit, *files), (*([before] if before else []), *_file_now(unit, machine)))
    at_boot = Command(f"The service {UNIT} starts at boot", ("systemctl", "enable", UNIT), (), ("systemctl", "is-enabled", UNIT))
    # By the new release, before anything leads to it: a fault leaves the service as it is.
    as_service = (f"{release.path}/.venv/bin/python", "-I", "-m", "gptutor.cli.as_service")
    migrated = Command("Migrations of the database", (*as_service, "migrate"), (running,))
    checked = Command("Check of the settings, with this release", (*as_service, "check"), (running,))
    if missing:
        steps += [current, unit, reads]
    else:
        if "database.url" in _given(machine, found) and wanted.release is None:
            steps.append(migrated)
        steps += [checked, current, unit, reads, at_boot, running]
    steps.append(Prune(f"{wanted.prefix}/releases", _kept(wanted, machine, current, before)))
    return Plan(tuple(steps), tuple(_notes(wanted, machine, found, missing, unit)))


# -- the release


def chosen_release(wanted: Installation, machine: Machine) -> Release:
    """The release to run: one that is installed already, or a new one. Raises InstallError."""
    installed = installed_releases(wanted.prefix, machine)
    if wanted.release is not None:
        if wanted.release not in installed:
            names = ", ".join(installed) or "none"
            raise InstallError(
                f"The release {wanted.release} is not installed in {wanted.prefix}/releases. Installed are: {names}."
            )
        return _release(wanted, wanted.release, installed[wanted.release])
    absent = [name for name in SOURCES if not (wanted.source / name).exists()]
    if absent:
        raise InstallError(
            f"{wanted.source} is not a clone of GPTutor: it has no {absent[0]}. Run this from a clone, or name an installed "
            "release with --release."
        )
    found = digest(wanted.source)
    for name, text in installed.items():
        if text == found:
            return _release(wanted, name, found)
    return _release(wanted, f"{__version__}+{found[:8]}" if __version__ in installed else __version__, found)


def _release(wanted: Installation, name: str, found: str) -> Release:
    return Release(f"{wanted.prefix}/releases/{name}", wanted.source, found)


def installed_releases(prefix: str, machine: Machine) -> dict[str, str]:
    """Name → digest, the newest first."""
    markers = list(machine.path(f"{prefix}/releases").glob(f"*/{MARKER}"))
    markers.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return {path.parent.name: path.read_text() for path in markers}


def _link_now(link: Link, machine: Machine) -> Link | None:
    path = machine.path(link.path)
    return Link(link.path, str(path.readlink())) if path.is_symlink() else None


def _file_now(file: File, machine: Machine) -> Iterator[File]:
    path = machine.path(file.path)
    if path.is_file():
        yield replace(file, content=path.read_text("utf-8"))


def _kept(wanted: Installation, machine: Machine, current: Link, before: Link | None) -> frozenset[str]:
    """The release that runs, the one before, which may still finish requests, and the newest others."""
    names = [Path(link.target).name for link in (current, before) if link is not None]
    names += [name for name in installed_releases(wanted.prefix, machine) if name not in names]
    return frozenset(names[:RELEASES_KEPT])


def _unit_text(wanted: Installation, release: Release, machine: Machine) -> str:
    """The unit that belongs to the release."""
    installed = machine.path(release.path) / "deploy" / f"{UNIT}.service"
    source = installed if release.holds(machine) else wanted.source / "deploy" / f"{UNIT}.service"
    return source.read_text("utf-8").replace(PREFIX, wanted.prefix)


# -- settings and data


def _settings(wanted: Installation, machine: Machine, found: Found) -> Iterator[File]:
    """config.yaml, gptutor.env and the secrets. What is there already keeps its content, and gets its owner and mode."""
    yield File(f"{SETTINGS}/config.yaml", CONFIG % wanted.prefix, "root", USER, 0o640, is_kept=True)
    plain = [f"{name}={value}\n" for name, value in found.settings.items() if not is_secret(name)]
    yield File(f"{SETTINGS}/{ENV_FILE}", "".join(plain), "root", USER, 0o640, is_kept=True)
    secrets = {name.upper(): f"{value}\n" for name, value in found.settings.items() if is_secret(name) and value}
    for name in sorted({*secrets, *_credentials(machine)}):
        yield File(f"{CREDENTIALS}/{name}", secrets.get(name, ""), "root", "root", 0o600, is_kept=True)


def _credentials(machine: Machine) -> list[str]:
    """Raises PermissionError."""
    folder = machine.path(CREDENTIALS)
    return [path.name for path in folder.iterdir() if stat.S_ISREG(path.lstat().st_mode)] if folder.is_dir() else []


def _given(machine: Machine, found: Found) -> set[str]:
    """`section.key` of all that the installation sets, or will set."""
    folder = machine.path(SETTINGS)
    names: dict[str, Any] = {**read_env_file(folder / ENV_FILE), **found.settings, **dict.fromkeys(_credentials(machine), "")}
    given = set(settings_of(names, "").values())
    if (folder / "config.yaml").is_file():
        given |= {name for name in read_settings(folder / "config.yaml")[1] if "." in name}
    return given


def _missing(machine: Machine, found: Found) -> list[str]:
    """The settings without which there is nothing to sell, or nothing that lasts."""
    given = _given(machine, found)
    needed = ["OPENROUTER_API_KEY", "GPTUTOR_SECRET_KEY"] if "database.url" in given else ["OPENROUTER_API_KEY"]
    return [name for name in needed if SHORT_NAMES[name] not in given]


def _data(wanted: Installation, machine: Machine, found: Found) -> Iterator[Step]:
    source = wanted.data_from or (found.folder / "var" if found.folder else None)
    if source is None:
        return
    if not source.is_dir():
        if wanted.data_from:
            raise InstallError(f"There is no folder {source} to take the data from.")
        return
    copy = Copy(source, DATA)
    if machine.is_this_one and not copy.holds(machine):
        yield Command(f"The service {UNIT} is stopped, and settles its charges", ("systemctl", "stop", UNIT), (copy,))
    yield copy


# -- what to say


def _notes(wanted: Installation, machine: Machine, found: Found, missing: list[str], unit: File) -> Iterator[str]:
    if found.settings:
        yield (
            f"The settings were taken from {found.folder or wanted.source}; from now on those in {SETTINGS} count. Remove "
            f"{(found.folder or wanted.source) / ENV_FILE}: it has secrets."
        )
    left = wanted.source / "var"
    if not (wanted.data_from or found.folder or machine.path(f"{DATA}/journal").exists()) and (left / "journal").is_dir():
        yield (
            f"The data in {left} was not taken over. If customers were served from there: stop that service and the new one, "
            f"empty {DATA}, and run this again with --data-from {left}"
        )
    if machine.path(UNIT_FILE).exists() and not unit.holds(machine):
        yield f"The unit was changed: limits and secrets that it sets apply from the next start on (systemctl restart {UNIT})."
    for name in missing:
        value = "openssl rand -base64 32" if name == "GPTUTOR_SECRET_KEY" else "printf %s 'the key'"
        yield f"Not started: {name} is missing. {value} | sudo install -m 600 /dev/stdin {CREDENTIALS}/{name}"
    if missing:
        yield "Then run this again."


def check_python(base: Path) -> None:
    """The service cannot enter home folders (ProtectHome). Raises InstallError."""
    for home in (Path("/home"), Path("/root")):
        if base.resolve().is_relative_to(home):
            raise InstallError(
                f"The Python of this environment is in {base}, which the service cannot read. Make the environment with the "
                "system's: rm -rf .venv && make install PYTHON=/usr/bin/python3"
            )
