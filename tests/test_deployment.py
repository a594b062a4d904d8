"""The unit, `make service`, the Dockerfile and the compose file, as far as they can be judged without starting them."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from gptutor.cli.installation import CREDENTIALS, DATA, LOGS, SETTINGS
from gptutor.config import schema
from gptutor.config.load import load
from gptutor.config.messages import SECRETS
from tests.support.service import environment, run

ROOT = Path(__file__).parent.parent
UNIT = ROOT / "deploy" / "gptutor.service"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
EXPOSURE_MAX = 1.5
STOP_S = schema.ServerSettings().shutdown_s + schema.ServerSettings().drain_s


def unit() -> list[tuple[str, str]]:
    return re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE)


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile, with its arguments in one line."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text()))


# -- the unit


def test_the_unit_fits_the_installer_and_the_service() -> None:
    settings = dict(unit())
    assert int(settings["TimeoutStopSec"]) > STOP_S
    assert (settings["Type"], settings["NotifyAccess"], settings["KillMode"]) == ("notify", "main", "mixed")
    assert settings["Environment"] == f"GPTUTOR_CONFIG={SETTINGS}/config.yaml"
    assert settings["LoadCredential"] == f"gptutor:{CREDENTIALS}"
    for kind, folder in (("State", DATA), ("Logs", LOGS), ("Runtime", "/run/gptutor")):
        assert (Path(folder).name, settings[f"{kind}Directory"], settings[f"{kind}DirectoryMode"]) == (
            "gptutor",
            "gptutor",
            "0750",
        )
    assert "EnvironmentFile" not in settings, "the service reads gptutor.env itself, also at a reload"
    assert "ProcSubset" not in settings, "the journal needs /proc/sys/kernel/random/boot_id"


def test_a_reload_checks_before_the_signal_and_can_read_the_credentials() -> None:
    check, signal = [value for name, value in unit() if name == "ExecReload"]
    assert check.startswith("+"), "systemd 252 hides the credentials from ExecReload: root reads the files"
    assert check.endswith("/.venv/bin/python -I -m gptutor.cli.as_service check")
    assert signal == "/bin/kill -HUP $MAINPID"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed (Debian: apt install systemd)")
def test_systemd_finds_no_fault_in_the_unit_and_little_exposure(tmp_path: Path) -> None:
    here = tmp_path / "gptutor.service"
    here.write_text(re.sub(r"/opt/gptutor/current/\.venv/bin/\w+", sys.executable, UNIT.read_text()))
    verified = subprocess.run(["systemd-analyze", "verify", str(here)], check=False, capture_output=True, text=True)
    assert (verified.returncode, [line for line in verified.stderr.splitlines() if here.name in line]) == (0, [])
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(here)], check=False, capture_output=True, text=True
    )
    exposure = re.search(r"exposure level for gptutor\.service: ([\d.]+)", rated.stdout)
    assert exposure, rated.stderr
    assert float(exposure[1]) <= EXPOSURE_MAX, rated.stdout


def test_make_service_installs_with_the_environment_of_the_clone(tmp_path: Path) -> None:
    """Only the installer runs as root; what `make` does before it is the caller's own."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "requirements"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    made = subprocess.run(
        ["make", "--no-print-directory", "service", "SUDO=echo sudo", "ARGS=--release 0.1"],
        cwd=tmp_path, env={**os.environ, "MAKEFLAGS": ""}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert made.stdout == f"sudo {tmp_path}/.venv/bin/gptutor install-service --release 0.1\n"


# -- the container


def test_the_image_is_built_from_lock_files_and_runs_as_an_ordinary_user() -> None:
    steps = instructions()
    assert {step for step, _ in steps} <= {
        *("FROM", "WORKDIR", "RUN", "COPY", "ENV", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD")
    }
    runs = [line for step, line in steps if step == "RUN"]
    installed = [command for line in runs for command in line.split("&&") if "pip" in command and " install " in command]
    assert len(installed) == 3
    assert all("--require-hashes -r requirements/" in command or "--no-deps" in command for command in installed)
    last = [number for number, (step, _) in enumerate(steps) if step == "FROM"][-1]
    assert [line for step, line in steps[last:] if step == "USER"] == ["10001:10001"]
    assert not re.search(
        r"KEY|SECRET|TOKEN|PASSWORD|DATABASE_URL", " ".join(line for step, line in steps if step in ("ENV", "ARG"))
    )
    health = next(line for step, line in steps if step == "HEALTHCHECK")
    assert "/health" in health
    assert dict(steps)["ENTRYPOINT"] == '["gptutor"]'
    assert dict(steps)["CMD"] == '["serve"]'


def test_what_the_image_copies_exists_and_reaches_the_build() -> None:
    ignored = [
        line for line in (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    assert ignored[0] == "*", "no secret of the folder gets into the build"
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied: set[str] = set()
    for step, line in instructions():
        if step == "COPY" and not line.startswith("--from"):
            *sources, _ = line.split()
            copied |= {source.partition("/")[0] for source in sources}
            assert all((ROOT / source).exists() for source in sources), line
    assert copied == allowed


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
async def test_the_health_check_of_the_image_follows_the_service(aiohttp_server: Any, status: int | None, code: int) -> None:
    """The command itself, against a service that is well, one that is not, and a port where nothing listens."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status or 500)

    health = next(line for step, line in instructions() if step == "HEALTHCHECK")
    command = yaml.safe_load(health.partition("CMD ")[2])
    app = web.Application()
    app.router.add_get("/health", answer)
    port = str((await aiohttp_server(app)).port) if status else "9"
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command[1:], env={**os.environ, "PORT": port}, stderr=asyncio.subprocess.DEVNULL
    )
    assert (command[0], await process.wait()) == ("python", code)


def test_the_settings_of_the_image_and_of_the_compose_file_are_settings(tmp_path: Path) -> None:
    """Names of variables and of secrets, and the commands."""
    variables = dict(
        re.findall(r"((?:GPTUTOR_\w+|HOST|PORT))=(\S+)", " ".join(line for step, line in instructions() if step == "ENV"))
    )
    services = compose()["services"]
    for name, command in (("gptutor", None), ("migrate", ["migrate"])):
        service = services[name]
        assert service.get("command") == command
        variables |= {key: value for key, value in service["environment"].items() if key != "CREDENTIALS_DIRECTORY"}
        for secret in service["secrets"]:
            (tmp_path / secret).write_text("postgresql://u@h/d" if secret == "DATABASE_URL" else "x")
    config = load({**variables, "CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert (config.server.host, str(config.paths.data), str(config.paths.logs)) == ("0.0.0.0", DATA, LOGS)
    assert (config.openrouter.api_key, config.security.secret_key, config.database.url) == ("x", "x", "postgresql://u@h/d")
    assert "database.url" in SECRETS
    assert "Apply pending migrations" in run(environment(tmp_path), "migrate", "--help").stdout


def test_the_compose_file_is_whole() -> None:
    document = compose()
    services = document["services"]
    assert int(services["gptutor"]["stop_grace_period"].removesuffix("s")) > STOP_S
    assert services["gptutor"]["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}
    assert services["gptutor"]["ports"] == ["127.0.0.1:3001:3001"], "a proxy with TLS is in front"
    build = services["gptutor"]["build"]
    assert (ROOT / "deploy" / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE
    for service in services.values():
        assert set(service["secrets"]) <= set(document["secrets"])
        assert {volume.partition(":")[0] for volume in service["volumes"]} <= set(document["volumes"])
        assert set(service.get("depends_on", {})) <= set(services)
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert all(f"deploy/{Path(secret['file']).parent}/" in ignored for secret in document["secrets"].values())


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not installed")
def test_hadolint_finds_nothing() -> None:
    linted = subprocess.run(["hadolint", str(DOCKERFILE)], check=False, capture_output=True, text=True)
    assert (linted.returncode, linted.stdout) == (0, "")
