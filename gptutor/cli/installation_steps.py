"""What an installation consists of. Each step is a fact: it can tell whether it holds already, and make it hold.

A `Machine` is where they hold: this one, or a folder that looks like one (`--root`), in which an ordinary user may try all steps
that need neither root nor systemd.
"""

import grp
import hashlib
import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

MARKER = ".release"
"""Written last into the folder of a release: the digest of its source. Without it the release is incomplete."""
SOURCES = ("gptutor", "sql", "deploy", "requirements", "config.yaml", "setup.cfg", "pyproject.toml", "README.md", "CHANGELOG.md")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info", "node_modules")
# What a stopped PostgreSQL leaves in its folder, and what can only belong to a running one.
NOT_COPIED = shutil.ignore_patterns("postmaster.pid", ".s.*", "*.lock", "socket")


class InstallError(Exception):
    """The installation cannot go on; the text is a sentence for the operator."""


@dataclass(frozen=True, slots=True)
class Machine:
    root: Path = Path("/")

    @property
    def is_this_one(self) -> bool:
        return self.root == Path("/")

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def ids(self, owner: str, group: str) -> tuple[int, int] | None:
        """None where owners are not set: below another root."""
        if not self.is_this_one:
            return None
        try:
            return pwd.getpwnam(owner).pw_uid, grp.getgrnam(group).gr_gid
        except KeyError:
            return (-2, -2)  # they are made by an earlier step; no file belongs to them yet

    def run(self, command: Sequence[str]) -> None:
        """Raises InstallError, after the command has said why."""
        try:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, cwd="/")  # noqa: S603 - commands of steps
        except FileNotFoundError:
            raise InstallError(f"{command[0]} is missing on this machine; install its package.") from None
        except subprocess.CalledProcessError as error:
            raise InstallError(f"This failed with status {error.returncode}: {' '.join(command)}") from None

    def output(self, command: Sequence[str]) -> str:
        """What a command prints; empty if it fails or does not exist."""
        try:
            ran = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)  # noqa: S603
        except (OSError, subprocess.CalledProcessError):
            return ""
        return ran.stdout


class Step(Protocol):
    @property
    def text(self) -> str: ...

    @property
    def needs_system(self) -> bool:
        """Whether it needs root or systemd, and so is skipped below another root."""

    def holds(self, machine: Machine) -> bool: ...

    def make(self, machine: Machine) -> None:
        """Raises InstallError, OSError."""


# -- users, folders, files


@dataclass(frozen=True, slots=True)
class User:
    """A system user without a login, and its group."""

    name: str
    home: str
    needs_system: bool = True

    @property
    def text(self) -> str:
        return f"User and group {self.name}, without a login"

    def holds(self, machine: Machine) -> bool:
        return all(machine.output(["getent", database, self.name]) for database in ("group", "passwd"))

    def make(self, machine: Machine) -> None:
        if not machine.output(["getent", "group", self.name]):
            machine.run(["groupadd", "--system", self.name])
        if not machine.output(["getent", "passwd", self.name]):
            shell = ("--no-create-home", "--shell", "/usr/sbin/nologin")
            machine.run(["useradd", "--system", "--gid", self.name, "--home-dir", self.home, *shell, self.name])


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder with its owner and mode; with `whole`, all that is in it belongs to the same owner."""

    path: str
    owner: str
    group: str
    mode: int
    whole: bool = False
    needs_system: bool = False

    @property
    def text(self) -> str:
        return f"Folder {self.path}, of {self.owner}:{self.group}, mode {self.mode:04o}{', with all in it' if self.whole else ''}"

    def holds(self, machine: Machine) -> bool:
        path = machine.path(self.path)
        return path.is_dir() and _has(path, machine, self) and not (self.whole and any(self._foreign(machine)))

    def make(self, machine: Machine) -> None:
        path = machine.path(self.path)
        path.mkdir(parents=True, exist_ok=True)
        _set(path, machine, self)
        for folder, name, (uid, gid) in self._foreign(machine) if self.whole else ():
            os.chown(name, uid, gid, dir_fd=folder, follow_symlinks=False)

    def _foreign(self, machine: Machine) -> Iterator[tuple[int, str, tuple[int, int]]]:
        """What belongs to others, by the descriptor of its folder and its name, and to whom it should belong.

        A file with several names is left alone: another name of it may be outside of the folder.
        """
        ids = machine.ids(self.owner, self.group)
        if ids is None:
            return
        for _, folders, files, descriptor in os.fwalk(machine.path(self.path), follow_symlinks=False):
            for name in (*folders, *files):
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                is_shared = not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1
                if (status.st_uid, status.st_gid) != ids and not is_shared:
                    yield descriptor, name, ids


@dataclass(frozen=True, slots=True)
class File:
    """A file with its content, owner and mode. With `is_kept`, an existing one keeps its content, which is never printed."""

    path: str
    content: str = field(repr=False)
    owner: str
    group: str
    mode: int
    is_kept: bool = False
    needs_system: bool = False

    @property
    def text(self) -> str:
        return f"File {self.path}, of {self.owner}:{self.group}, mode {self.mode:04o}"

    def holds(self, machine: Machine) -> bool:
        path = machine.path(self.path)
        return path.is_file() and _has(path, machine, self) and (self.is_kept or path.read_text("utf-8") == self.content)

    def make(self, machine: Machine) -> None:
        path = machine.path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (path.is_file() and (self.is_kept or path.read_text("utf-8") == self.content)):
            if path.is_file():  # an administrator may have changed it
                shutil.copy2(path, f"{path}~")
            new = path.with_name(f".{path.name}.new")
            new.unlink(missing_ok=True)
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(self.content)
            _set(new, machine, self)
            new.replace(path)
        _set(path, machine, self)


def _has(path: Path, machine: Machine, wanted: Folder | File) -> bool:
    status = path.stat()
    ids = machine.ids(wanted.owner, wanted.group)
    return stat.S_IMODE(status.st_mode) == wanted.mode and ids in (None, (status.st_uid, status.st_gid))


def _set(path: Path, machine: Machine, wanted: Folder | File) -> None:
    ids = machine.ids(wanted.owner, wanted.group)
    if ids is not None:
        os.chown(path, *ids)
    path.chmod(wanted.mode)


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link, replaced in one step: a reader finds the old target or the new one."""

    path: str
    target: str
    needs_system: bool = False

    @property
    def text(self) -> str:
        return f"Link {self.path} to {self.target}"

    def holds(self, machine: Machine) -> bool:
        path = machine.path(self.path)
        return path.is_symlink() and str(path.readlink()) == self.target

    def make(self, machine: Machine) -> None:
        path = machine.path(self.path)
        new = path.with_name(f".{path.name}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(self.target)
        new.replace(path)


@dataclass(frozen=True, slots=True)
class Copy:
    """The data of a service that ran from another folder. The original stays."""

    source: Path
    path: str
    needs_system: bool = False

    @property
    def text(self) -> str:
        return f"Copy the data in {self.source} to {self.path}; the original stays"

    def holds(self, machine: Machine) -> bool:
        path = machine.path(self.path)
        return path.is_dir() and any(path.iterdir())

    def make(self, machine: Machine) -> None:
        shutil.copytree(self.source, machine.path(self.path), symlinks=True, dirs_exist_ok=True, ignore=NOT_COPIED)


# -- releases


def digest(source: Path) -> str:
    """Of all files that make a release, and of the Python that its environment is for."""
    hashed = hashlib.sha256(f"{sys.version_info.major}.{sys.version_info.minor}".encode())
    for name in SOURCES:
        for path in sorted(_files(source / name)):
            hashed.update(f"\0{path.relative_to(source)}\0".encode())
            hashed.update(os.readlink(path).encode() if path.is_symlink() else hashlib.sha256(path.read_bytes()).digest())
    return hashed.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir() or path.is_symlink():
        yield path
        return
    names = os.listdir(path)
    for name in set(names) - LEFT_OUT(str(path), names):
        yield from _files(path / name)


@dataclass(frozen=True, slots=True)
class Release:
    """A copy of the source with an environment of its own, from the lock files. Only root may change it."""

    path: str
    source: Path
    digest: str
    needs_system: bool = False

    @property
    def text(self) -> str:
        return f"Release {self.path} with an environment from the lock files (half a minute)"

    def holds(self, machine: Machine) -> bool:
        marker = machine.path(self.path) / MARKER
        return marker.is_file() and marker.read_text() == self.digest

    def make(self, machine: Machine) -> None:
        path = machine.path(self.path)
        if path.exists():
            shutil.rmtree(path)  # an interrupted attempt
        path.mkdir(parents=True)
        for name in SOURCES:
            source = self.source / name
            if source.is_dir():
                shutil.copytree(source, path / name, symlinks=True, ignore=LEFT_OUT)
            else:
                shutil.copy(source, path / name)
        for one in path.rglob("*"):  # the clone may be readable by its owner alone
            if not one.is_symlink():
                one.chmod(0o755 if one.is_dir() else 0o644)
        python = f"{path}/.venv/bin/python"
        pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "-qq")
        machine.run([sys.executable, "-m", "venv", f"{path}/.venv"])
        for lock in ("build", "run"):
            machine.run([*pip, "--require-hashes", "-r", f"{path}/requirements/{lock}.txt"])
        machine.run([*pip, "--no-deps", "--no-build-isolation", "--editable", str(path)])
        machine.run([python, "-m", "compileall", "-q", f"{path}/gptutor"])
        (path / MARKER).write_text(self.digest)


@dataclass(frozen=True, slots=True)
class Prune:
    """Only these releases are left."""

    path: str
    kept: frozenset[str]
    needs_system: bool = False

    @property
    def text(self) -> str:
        return f"No older releases in {self.path} than the last ones"

    def holds(self, machine: Machine) -> bool:
        return not self._others(machine)

    def make(self, machine: Machine) -> None:
        for path in self._others(machine):
            shutil.rmtree(path)

    def _others(self, machine: Machine) -> list[Path]:
        path = machine.path(self.path)
        return [one for one in path.iterdir() if one.name not in self.kept] if path.is_dir() else []


# -- commands


@dataclass(frozen=True, slots=True)
class Command:
    """Run if one of `follows` did not hold, or if what `unless` prints is empty."""

    text: str
    command: tuple[str, ...]
    follows: tuple[Step, ...] = ()
    unless: tuple[str, ...] = ()
    needs_system: bool = True

    def holds(self, machine: Machine) -> bool:
        is_done = not self.unless or bool(machine.output(self.unless))
        return is_done and all(step.holds(machine) for step in self.follows)

    def make(self, machine: Machine) -> None:
        machine.run(self.command)


@dataclass(frozen=True, slots=True)
class Running:
    """The service runs with what the installation has now: it is started, or told to reload."""

    unit: str
    follows: tuple[Step, ...]
    before: tuple[Step, ...]
    """What was there: restored if the reload is refused, so that a crash starts what runs now."""
    needs_system: bool = True

    @property
    def text(self) -> str:
        return f"The service {self.unit} runs with this release"

    def is_active(self, machine: Machine) -> bool:
        return machine.output(["systemctl", "is-active", self.unit]).strip() in ("active", "reloading")

    def holds(self, machine: Machine) -> bool:
        return self.is_active(machine) and all(step.holds(machine) for step in self.follows)

    def make(self, machine: Machine) -> None:
        if not self.is_active(machine):
            try:
                machine.run(["systemctl", "restart", self.unit])
            except InstallError:
                raise InstallError(f"The service did not start. Its last words: journalctl -u {self.unit} -n 30") from None
            return
        try:
            machine.run(["systemctl", "reload", self.unit])
        except InstallError:
            for step in self.before:
                step.make(machine)
            machine.run(["systemctl", "daemon-reload"])
            raise InstallError(
                f"The reload was refused, and what ran before goes on. Why: journalctl -u {self.unit} -n 30"
            ) from None
