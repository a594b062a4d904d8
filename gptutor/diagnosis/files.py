"""The settings, who may read and write the files, and the room on the disks."""

import os
import pwd
import shutil
import stat
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from gptutor.config.files import ENV_FILE
from gptutor.config.load import CONFIG_PATH_VARIABLE
from gptutor.config.schema import Config
from gptutor.diagnosis.findings import Finding, Installation, error, ok, warning
from gptutor.money.journal import JOURNALS

OTHERS = stat.S_IRWXO
GROUP_AND_OTHERS = stat.S_IRWXG | stat.S_IRWXO
LOOPBACK = ("127.0.0.1", "::1", "localhost")
FILES_MAX = 10_000
"""So many files of a folder are looked at."""
FREE_BYTES_LEAST = 256 << 20
FREE_BYTES_LOW = 2 << 30
FREE_INODES_LOW = 10_000
MB = 1 << 20
IDLE_BYTES = 150 * MB
LARGE_BODY_BYTES = 120 * MB
CONNECTION_BYTES = 400 * 1024
"""What a process needs, as the page about capacity says."""


def configuration(installation: Installation) -> Sequence[Finding]:
    config, findings = installation.config, [ok("All settings are valid.")]
    if config.simulated:
        findings.append(warning("A simulator answers in place of OpenRouter: set OPENROUTER_API_KEY before you sell anything."))
    if config.server.host not in LOOPBACK:
        findings.append(
            warning(
                f"The service listens on {config.server.host} without TLS: set HOST=127.0.0.1, and put a reverse proxy in front."
            )
        )
    if config.yookassa.is_set and config.yookassa.test_mode:
        findings.append(warning("Test payments are credited: set yookassa.test_mode to false."))
    return findings


def files(installation: Installation) -> Sequence[Finding]:
    """Modes and owners. The owner of `paths.data` is the user that the service runs as."""
    config = installation.config
    data, logs = config.paths.data, config.paths.logs
    if not data.exists():
        return [ok(f"{data} does not exist yet: the service makes it at its first start.")]
    owner = data.stat().st_uid
    findings: list[Finding] = []
    for path in _secret_files(config):
        findings += _private(path, data.stat())
    for folder in (data, logs):
        findings += _folder(folder, owner) if folder.exists() else []
    for folder in (data / JOURNALS, logs):
        foreign = [path for path in islice(_below(folder), FILES_MAX) if path.lstat().st_uid != owner]
        if foreign:
            findings.append(
                error(
                    f"{foreign[0]} and {len(foreign) - 1} other files belong to {_name(foreign[0].lstat().st_uid)}, and not to "
                    f"{_name(owner)}: chown -R {_name(owner)} {folder}"
                    if len(foreign) > 1
                    else f"{foreign[0]} belongs to {_name(foreign[0].lstat().st_uid)}: chown {_name(owner)} {foreign[0]}"
                )
            )
    return findings or [ok(f"Secrets can be read by {_name(owner)} alone, and data and logs belong to them.")]


def _secret_files(config: Config) -> list[Path]:
    """Those that exist, credentials of systemd apart."""
    env_file = Path(os.environ.get(CONFIG_PATH_VARIABLE, "")).parent / ENV_FILE
    candidates = [env_file, config.paths.data / "secret-key"]
    return [path for path in candidates if path.is_file()]


def _private(path: Path, service: os.stat_result) -> list[Finding]:
    """A secret belongs to the service or to root; only the service's group may read it as well."""
    found, findings = path.stat(), []
    allowed = stat.S_IRGRP if found.st_gid == service.st_gid and found.st_uid != service.st_uid else 0
    if found.st_mode & GROUP_AND_OTHERS & ~allowed:
        findings.append(
            error(f"Other users of this machine may read or change {path}: chmod {'640' if allowed else '600'} {path}")
        )
    if found.st_uid not in (0, service.st_uid):
        name = _name(service.st_uid)
        findings.append(error(f"{path} belongs to {_name(found.st_uid)}, and the service runs as {name}: chown {name} {path}"))
    return findings


def _folder(path: Path, owner: int) -> list[Finding]:
    found, findings = path.stat(), []
    if found.st_mode & stat.S_IWOTH:
        findings.append(error(f"Other users of this machine may write into {path}: chmod o-w {path}"))
    if found.st_uid != owner:
        findings.append(
            error(f"{path} belongs to {_name(found.st_uid)}, and not to {_name(owner)}: chown -R {_name(owner)} {path}")
        )
    return findings


def credentials(installation: Installation) -> Sequence[Finding]:
    """systemd's LoadCredential=: the folder is visible to the service alone, and to a `systemd-run` with the same credentials."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    source = Path(os.environ.get(CONFIG_PATH_VARIABLE, "")).parent / "credentials"
    if source.is_dir() and source.stat().st_mode & GROUP_AND_OTHERS:
        return [error(f"Others than root may enter {source}, where the secrets are: chmod 700 {source}")]
    if not folder:
        return [ok("No credentials of systemd are visible to this command.")]
    findings: list[Finding] = []
    for path in sorted(Path(folder).iterdir()):
        if path.stat().st_mode & OTHERS:
            findings.append(error(f"Other users may read the credential {path.name}: its source must have mode 600."))
        elif not os.access(path, os.R_OK):
            findings.append(error(f"The credential {path.name} cannot be read: check LoadCredential= of the unit."))
    return findings or [ok(f"The credentials in {folder} can be read, and not by others.")]


def disk(installation: Installation) -> Sequence[Finding]:
    """Free space for unprivileged users, and free inodes."""
    paths, findings = installation.config.paths, []
    seen: set[int] = set()
    for name, path in (("data", paths.data), ("logs", paths.logs)):
        place = next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())
        device = place.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        space, table = shutil.disk_usage(place), os.statvfs(place)
        told = f"{space.free / MB:.0f} MB of {space.total / MB:.0f} MB are free on the disk of {path.resolve()} ({name})"
        advice = "delete what is not needed, lower logs.retention_days, or enlarge the disk"
        if space.free < FREE_BYTES_LEAST:
            findings.append(error(f"Only {told}: without room nothing is sold. Now {advice}."))
        elif space.free < FREE_BYTES_LOW:
            findings.append(warning(f"Only {told}: {advice}."))
        elif table.f_files and table.f_favail < FREE_INODES_LOW:
            findings.append(warning(f"Only {table.f_favail} more files fit on the disk of {path.resolve()}: {advice}."))
        else:
            findings.append(ok(f"{told}."))
    return findings


def memory(installation: Installation) -> Sequence[Finding]:
    """The most that all processes may need, as the page about capacity adds it up."""
    server, upstream = installation.config.server, installation.config.openrouter
    process = IDLE_BYTES + LARGE_BODY_BYTES + server.bodies_bytes_max + upstream.plain_bytes_total
    needed = server.workers * (process + server.connections_max * CONNECTION_BYTES)
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    told = f"{server.workers} × the most that a process needs is {needed / MB:.0f} MB, of {present / MB:.0f} MB on this machine"
    if needed > present:
        return [
            warning(
                f"{told}: lower server.connections_max, server.bodies_bytes_max or openrouter.plain_bytes_total, or add memory."
            )
        ]
    return [ok(f"{told}.")]


def _below(folder: Path) -> Iterator[Path]:
    return folder.rglob("*") if folder.is_dir() else iter(())


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
