"""`gptutor install-service`: from a clone to a service, twice, to another version and back."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptutor import __version__
from gptutor.cli import as_service, console, install_service, installation
from gptutor.cli.install_service import carry_out
from gptutor.cli.installation import CREDENTIALS, SETTINGS, UNIT_FILE, Installation, check_python, look, make_plan
from gptutor.cli.installation_steps import SOURCES, InstallError, Machine
from tests.support.service import environment, refused, run

SECRET = "s3cret-7391"
ENV = (
    f"OPENROUTER_API_KEY={SECRET}\nhttps_proxy=http://u:{SECRET}@h:1\nGPTUTOR_BILLING__RUB_PER_USD=95\nGPTUTOR_PATHS__DATA=old\n"
)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the installer needs of a clone, with little in it."""
    folder = tmp_path / "clone"
    for name in SOURCES:
        if "." in name:
            folder.mkdir(exist_ok=True)
            (folder / name).write_text("{}" if name == "config.yaml" else name)
        else:
            (folder / name).mkdir(parents=True)
            (folder / name / "file").write_text(name)
    (folder / "sql" / "file").chmod(0o600)  # as git makes files for a root who keeps to themselves
    (folder / "gptutor" / "sql").symlink_to("../sql")
    (folder / "deploy" / "gptutor.service").write_text("ExecStart=/opt/gptutor/current/.venv/bin/gptutor serve\n")
    return folder


@dataclass(frozen=True)
class Trial(Machine):
    """A folder in place of /. No command is run, but those that make an environment leave a trace."""

    ran: list[str] = field(default_factory=list)
    failing: set[str] = field(default_factory=set)

    def run(self, command: Sequence[str]) -> None:
        line = " ".join(command).replace(str(self.root), "")
        self.ran.append(line)
        if any(words in line for words in self.failing):
            raise InstallError(f"failed: {line}")
        if "-m venv" in line:
            Path(command[-1], "bin").mkdir(parents=True)

    def output(self, command: Sequence[str]) -> str:
        return ""


@dataclass(frozen=True)
class Pretended(Trial):
    """The same, as if the folder were this machine: with the steps that need root and systemd, and with owners that can be set."""

    state: dict[str, str] = field(default_factory=dict)

    @property
    def is_this_one(self) -> bool:
        return True

    def ids(self, owner: str, group: str) -> tuple[int, int]:
        return os.getuid(), os.getgid()

    def output(self, command: Sequence[str]) -> str:
        return self.state.get(" ".join(command), "")

    def run(self, command: Sequence[str]) -> None:
        super().run(command)
        for made, shown in {
            "groupadd": "getent group gptutor",
            "useradd": "getent passwd gptutor",
            "enable": "systemctl is-enabled gptutor",
            "restart": "systemctl is-active gptutor",
        }.items():
            if made in command:
                self.state[shown] = "active\n"


def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path / "root")


def pretended(tmp_path: Path) -> Pretended:
    return Pretended(tmp_path / "root")


def install(wanted: Installation, machine: Machine, *, dry_run: bool = False) -> dict[str, str]:
    """What became of each step."""
    plan = make_plan(wanted, machine, look(wanted, machine))
    return {step.text: what for step, what in carry_out(plan, machine, dry_run=dry_run)}


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Path → mode, and content or target."""
    found = {}
    for path in folder.rglob("*"):
        content = str(path.readlink()) if path.is_symlink() else path.read_text() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (stat.S_IMODE(path.lstat().st_mode), content)
    return found


def changed(outcome: dict[str, str]) -> list[str]:
    return [text for text, what in outcome.items() if what not in ("holds", "skipped")]


def current(machine: Machine) -> str:
    return str(machine.path("/opt/gptutor/current").readlink())


# -- a folder, as an ordinary user


def test_a_second_run_changes_nothing(clone: Path, tmp_path: Path) -> None:
    machine = trial(tmp_path)
    wanted = Installation(clone)
    umask = os.umask(0o077)  # the service must read its release all the same
    try:
        assert len(changed(install(wanted, machine))) == 12
    finally:
        os.umask(umask)
    before = tree(machine.root)
    ran = list(machine.ran)
    assert changed(install(wanted, machine)) == []
    assert tree(machine.root) == before
    assert machine.ran == ran
    assert not [line for line in ran if line.startswith(("systemctl", "useradd"))]
    release = machine.path(f"/opt/gptutor/releases/{__version__}")
    assert current(machine) == f"releases/{__version__}"
    assert all(path.lstat().st_mode & 0o044 == 0o044 for path in release.rglob("*"))
    assert [line for line in ran if "--require-hashes" in line and line.endswith("requirements/run.txt")]
    assert {name: oct(before[name][0]) for name in ("etc/gptutor", "etc/gptutor/credentials", "var/lib/gptutor")} == {
        "etc/gptutor": "0o750",
        "etc/gptutor/credentials": "0o700",
        "var/lib/gptutor": "0o750",
    }


def test_a_dry_run_lists_the_same_steps_and_changes_nothing(clone: Path, tmp_path: Path) -> None:
    machine = pretended(tmp_path)
    (clone / "gptutor.env").write_text(ENV)
    planned = install(Installation(clone), machine, dry_run=True)
    assert (machine.ran, machine.root.exists()) == ([], False)
    assert changed(planned) == changed(install(Installation(clone), machine))


def test_a_new_version_is_installed_beside_and_going_back_is_a_link(clone: Path, tmp_path: Path) -> None:
    machine = trial(tmp_path)
    install(Installation(clone), machine)
    (clone / "sql" / "file").write_text("changed")
    (clone / "deploy" / "gptutor.service").write_text("ExecStart=/opt/gptutor/current/new\n")
    outcome = install(Installation(clone), machine)
    second = Path(current(machine)).name
    assert second.startswith(f"{__version__}+")
    assert sorted(changed(outcome)) == [
        f"File {UNIT_FILE}, of root:root, mode 0644",
        f"Link /opt/gptutor/current to releases/{second}",
        f"Release /opt/gptutor/releases/{second} with an environment from the lock files (half a minute)",
    ]
    assert machine.path(UNIT_FILE).read_text().endswith("new\n")
    made = len(machine.ran)
    install(Installation(clone, release=__version__), machine)
    assert current(machine) == f"releases/{__version__}"
    assert machine.path(UNIT_FILE).read_text().endswith("serve\n"), "the unit belongs to the release"
    install(Installation(clone), machine)
    assert (Path(current(machine)).name, len(machine.ran)) == (second, made)
    with pytest.raises(InstallError, match=rf"9\.9 is not installed in /opt/gptutor/releases\. Installed are: .*{__version__}"):
        install(Installation(clone, release="9.9"), machine)


def test_the_last_three_releases_are_kept(clone: Path, tmp_path: Path) -> None:
    machine = trial(tmp_path)
    names = []
    for number in range(5):
        (clone / "sql" / "file").write_text(str(number))
        install(Installation(clone), machine)
        names.append(Path(current(machine)).name)
        os.utime(machine.path(f"/opt/gptutor/releases/{names[-1]}/.release"), (number, number))
    assert sorted(path.name for path in machine.path("/opt/gptutor/releases").iterdir()) == sorted(names[-3:])


def test_an_interrupted_installation_is_done_again(clone: Path, tmp_path: Path) -> None:
    machine = trial(tmp_path)
    machine.failing.add("--editable")
    with pytest.raises(InstallError):
        install(Installation(clone), machine)
    assert not machine.path("/opt/gptutor/current").exists()
    machine.failing.clear()
    install(Installation(clone), machine)
    assert machine.path("/opt/gptutor/current/.release").exists()


def test_without_a_clone_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match=r"is not a clone of GPTutor: it has no gptutor\. Run this from a clone"):
        install(Installation(tmp_path), trial(tmp_path))


def test_another_prefix_is_in_the_unit_and_in_the_wrapper(clone: Path, tmp_path: Path) -> None:
    machine = trial(tmp_path)
    install(Installation(clone, prefix="/srv/g"), machine)
    assert machine.path(UNIT_FILE).read_text() == "ExecStart=/srv/g/current/.venv/bin/gptutor serve\n"
    assert "/srv/g/current/.venv/bin/python -I" in machine.path("/usr/local/bin/gptutor").read_text()
    assert not machine.path("/opt").exists()


# -- settings and secrets


def test_the_settings_of_a_clone_are_taken_over_once_and_secrets_become_credentials(clone: Path, tmp_path: Path) -> None:
    machine = trial(tmp_path)
    (clone / "gptutor.env").write_text(ENV)
    (clone / "config.yaml").write_text("server: {port: 3005, workers: 1}\nadmin: {port: 0}\npaths: {logs: elsewhere}\n")
    wanted = Installation(clone)
    plan = make_plan(wanted, machine, look(wanted, machine))
    assert SECRET not in repr(plan), "neither in what is printed nor in a traceback"
    list(carry_out(plan, machine))
    assert any("from now on those in /etc/gptutor count" in note for note in plan.notes)
    files = tree(machine.path(SETTINGS))
    secrets = ("OPENROUTER_API_KEY", "HTTPS_PROXY")
    assert files["gptutor.env"] == (0o640, "GPTUTOR_SERVER__PORT=3005\nGPTUTOR_BILLING__RUB_PER_USD=95\n")
    assert {name for name in files if name.startswith("credentials/")} == {f"credentials/{name}" for name in secrets}
    assert files["credentials/OPENROUTER_API_KEY"] == (0o600, f"{SECRET}\n")
    assert files["credentials/HTTPS_PROXY"] == (0o600, f"http://u:{SECRET}@h:1\n")
    assert "data: /var/lib/gptutor" in files["config.yaml"][1]
    machine.path(f"{SETTINGS}/gptutor.env").write_text("PORT=1\n")
    machine.path(f"{CREDENTIALS}/OPENROUTER_API_KEY").write_text("new")
    machine.path(f"{CREDENTIALS}/OPENROUTER_API_KEY").chmod(0o644)
    assert len(changed(install(wanted, machine))) == 1
    files = tree(machine.path(SETTINGS))
    assert (files["gptutor.env"][1], files["credentials/OPENROUTER_API_KEY"]) == ("PORT=1\n", (0o600, "new"))


def test_what_is_missing_is_named_and_nothing_is_started(clone: Path, tmp_path: Path) -> None:
    machine = pretended(tmp_path)
    (clone / "gptutor.env").write_text("DATABASE_URL=postgresql:///gptutor\n")
    plan = make_plan(Installation(clone), machine, look(Installation(clone), machine))
    list(carry_out(plan, machine))
    notes = "\n".join(plan.notes)
    assert "OPENROUTER_API_KEY is missing. printf" in notes
    assert f"openssl rand -base64 32 | sudo install -m 600 /dev/stdin {CREDENTIALS}/GPTUTOR_SECRET_KEY" in notes
    assert not [line for line in machine.ran if "as_service" in line or "systemctl enable" in line]


# -- root and systemd


def test_the_service_is_checked_before_it_is_switched_and_started(clone: Path, tmp_path: Path) -> None:
    machine = pretended(tmp_path)
    (clone / "gptutor.env").write_text(ENV + "DATABASE_URL=postgresql:///gptutor\nGPTUTOR_SECRET_KEY=x\n")
    machine.failing.add("as_service check")
    with pytest.raises(InstallError):
        install(Installation(clone), machine)
    assert not machine.path("/opt/gptutor/current").exists()
    machine.failing.clear()
    install(Installation(clone), machine)
    release = f"/opt/gptutor/releases/{__version__}/.venv/bin/python -I -m gptutor.cli.as_service"
    assert machine.ran[:2] + machine.ran[-5:] == [
        "groupadd --system gptutor",
        "useradd --system --gid gptutor --home-dir /var/lib/gptutor --no-create-home --shell /usr/sbin/nologin gptutor",
        f"{release} migrate",
        *(f"{release} check", "systemctl daemon-reload", "systemctl enable gptutor", "systemctl restart gptutor"),
    ]


def test_a_new_version_is_reloaded_and_a_refused_reload_restores_what_was_there(clone: Path, tmp_path: Path) -> None:
    machine = pretended(tmp_path)
    (clone / "gptutor.env").write_text(ENV + "DATABASE_URL=postgresql:///gptutor\nGPTUTOR_SECRET_KEY=x\n")
    install(Installation(clone), machine)
    unit = machine.path(UNIT_FILE).read_text()
    assert changed(install(Installation(clone), machine)) == []
    (clone / "deploy" / "gptutor.service").write_text("new\n")
    machine.failing.add("systemctl reload")
    del machine.ran[:]
    with pytest.raises(InstallError, match="what ran before goes on"):
        install(Installation(clone), machine)
    assert (current(machine), machine.path(UNIT_FILE).read_text()) == (f"releases/{__version__}", unit)
    assert machine.ran[-2:] == ["systemctl reload gptutor", "systemctl daemon-reload"]
    machine.failing.clear()
    install(Installation(clone), machine)
    assert [line for line in machine.ran if "migrate" in line]
    assert machine.path(UNIT_FILE).read_text() == "new\n"
    assert machine.path(f"{UNIT_FILE}~").read_text() == unit, "what an administrator may have changed is kept beside"
    del machine.ran[:]
    install(Installation(clone, release=__version__), machine)
    assert not [line for line in machine.ran if "migrate" in line], "an older release does not migrate"
    assert "systemctl reload gptutor" in machine.ran


def test_wrong_owners_are_corrected_but_a_file_with_two_names_is_left(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that root ran in the folder of the service left files there that the service cannot write."""
    machine = pretended(tmp_path)
    (clone / "gptutor.env").write_text(ENV)
    install(Installation(clone), machine)
    logs = machine.path("/var/log/gptutor")
    (logs / "deep").mkdir()
    (logs / "deep" / "combined.log").write_text("")
    (tmp_path / "another").write_text("")
    (logs / "linked").hardlink_to(tmp_path / "another")
    monkeypatch.setattr(Pretended, "ids", lambda self, owner, group: (4711 if owner == "gptutor" else os.getuid(), os.getgid()))
    given: list[tuple[str, int]] = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid, **_: given.append((Path(path).name, uid)))
    install(Installation(clone), machine)
    assert set(given) == {("gptutor", 4711), ("deep", 4711), ("combined.log", 4711)}


def test_the_data_of_a_service_before_is_copied_after_it_has_stopped(clone: Path, tmp_path: Path) -> None:
    machine = pretended(tmp_path)
    (clone / "gptutor.env").write_text(ENV)
    before = tmp_path / "before"
    (before / "var" / "journal").mkdir(parents=True)
    (before / "var" / "journal" / "1.log").write_text("sent")
    (before / "var" / "postmaster.pid").write_text("1")
    (before / "gptutor.env").write_text("OPENROUTER_API_KEY=of-before\n")
    machine.state["systemctl show gptutor --property=WorkingDirectory --value"] = f"{before}\n"
    install(Installation(clone), machine)
    assert machine.ran.index("systemctl stop gptutor") < machine.ran.index("systemctl restart gptutor")
    assert machine.path("/var/lib/gptutor/journal/1.log").read_text() == "sent"
    assert not machine.path("/var/lib/gptutor/postmaster.pid").exists()
    assert machine.path(f"{CREDENTIALS}/OPENROUTER_API_KEY").read_text() == "of-before\n"
    assert (before / "var" / "journal" / "1.log").exists()
    machine.path("/var/lib/gptutor/journal/1.log").write_text("newer")
    del machine.ran[:]
    install(Installation(clone), machine)
    assert machine.path("/var/lib/gptutor/journal/1.log").read_text() == "newer"
    assert "systemctl stop gptutor" not in machine.ran


def test_data_in_a_clone_is_named_and_not_taken_unasked(clone: Path, tmp_path: Path) -> None:
    """It may be of a trial with the simulator."""
    (clone / "var" / "journal").mkdir(parents=True)
    machine = trial(tmp_path)
    plan = make_plan(Installation(clone), machine, look(Installation(clone), machine))
    assert [note for note in plan.notes if f"The data in {clone / 'var'} was not taken over" in note]
    assert not [step for step in plan.steps if step.text.startswith("Copy")]
    asked = Installation(clone, data_from=clone / "var")
    install(asked, machine)
    assert machine.path("/var/lib/gptutor/journal").is_dir()
    with pytest.raises(InstallError, match="There is no folder /nowhere"):
        install(Installation(clone, data_from=Path("/nowhere")), trial(tmp_path / "2"))


def test_a_python_in_a_home_folder_is_refused() -> None:
    check_python(Path("/usr"))
    with pytest.raises(InstallError, match=r"in /home/anna/\.pyenv, which the service cannot read"):
        check_python(Path("/home/anna/.pyenv"))


# -- the commands


def test_the_command_says_each_step_in_a_folder_of_its_own(tmp_path: Path) -> None:
    said = run(environment(tmp_path), "install-service", "--root", str(tmp_path / "root"), "--dry-run").stdout
    assert f"to do    Release /opt/gptutor/releases/{__version__}" in said
    assert "skipped  User and group gptutor" in said
    assert "steps to do; nothing was changed." in said
    assert not (tmp_path / "root").exists()
    assert "9.9 is not installed" in refused(
        environment(tmp_path), "install-service", "--root", str(tmp_path), "--release", "9.9"
    )


@pytest.mark.parametrize(("uid", "words"), [(1000, "run it with sudo"), (0, "There is no systemd here")])
def test_the_command_refuses_without_root_or_systemd(
    uid: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(install_service, "SYSTEMD", Path("/nowhere"))
    monkeypatch.setattr(install_service, "make_plan", None)
    with pytest.raises(SystemExit):
        install_service.install_service()
    assert words in " ".join(capsys.readouterr().err.split())


def test_the_administrators_command_has_the_services_settings_secrets_and_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root reads the secrets, gives up all privileges, and is known by the name of whoever called sudo."""
    (tmp_path / "OPENROUTER_API_KEY").write_text("sk-or-1")
    became: list[object] = []
    monkeypatch.setattr(as_service, "CREDENTIALS", str(tmp_path))
    monkeypatch.setattr(console, "caller", None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "umask", lambda mask: 0)
    users = SimpleNamespace(
        getpwnam=lambda name: SimpleNamespace(pw_uid=4711, pw_gid=4712, pw_dir="/var/lib/gptutor"),
        getpwuid=lambda uid: SimpleNamespace(pw_name=f"user-{uid}"),
    )
    monkeypatch.setattr(as_service, "pwd", users)
    for name in ("initgroups", "setgid", "setuid"):
        monkeypatch.setattr(os, name, lambda *given, name=name: became.append((name, *given)))
    environ = {"SUDO_UID": "1000", "GPTUTOR_WORKERS": "9", "OPENROUTER_BASE_URL": "http://evil", "HOME": "/root", "TERM": "x"}
    environ |= {"HOST": "workstation", "https_proxy": "http://own:1"}
    as_service.become_service_user(environ)
    assert became == [("initgroups", "gptutor", 4712), ("setgid", 4712), ("setuid", 4711)]
    assert {name: environ.get(name) for name in ("OPENROUTER_API_KEY", "GPTUTOR_CONFIG", "HOME", "GPTUTOR_WORKERS", "TERM")} == {
        "OPENROUTER_API_KEY": "sk-or-1",
        "GPTUTOR_CONFIG": "/etc/gptutor/config.yaml",
        "HOME": "/var/lib/gptutor",
        "GPTUTOR_WORKERS": None,
        "TERM": "x",
    }
    assert not {"OPENROUTER_BASE_URL", "HOST", "https_proxy"} & set(environ)
    assert console.os_user() == "user-1000"


def test_the_administrators_command_needs_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit):
        as_service.become_service_user({})
    assert "Run this with sudo" in capsys.readouterr().err


def test_the_wrapper_starts_what_installs_as_root() -> None:
    """Only root can install; every other command becomes the service's user first."""
    assert as_service.AS_ROOT == "install-service"
    assert "python -I -m gptutor.cli.as_service" in installation.WRAPPER_TEXT
