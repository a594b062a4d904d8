"""The installation from a clone, below a folder that stands for /: neither root nor systemd is needed."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from gptutor.cli import installation
from gptutor.cli.install_service import carry_out
from gptutor.cli.installation import PREFIX, Installation, look, make_plan
from gptutor.cli.installation_steps import LEFT_OUT, SOURCES, Machine
from tests.month.waiting import require
from tests.support.releases import make_next

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """\
#!{python}
import sys
sys.path.insert(0, {release!r})
from gptutor.cli.main import main
main()
"""


def make_clone(folder: Path) -> Path:
    """The files of this working copy that make a release."""
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=LEFT_OUT)
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


def update_clone(clone: Path) -> None:
    """What `git pull` brings: the next release."""
    make_next(clone / "gptutor", clone / "sql")


@dataclass(frozen=True, slots=True)
class ReusingMachine(Machine):
    """Its releases use the packages of this environment, which takes half a minute less for each than an environment of its own."""

    def run(self, command: Sequence[str]) -> None:
        if "venv" in command:
            environment = Path(command[-1])
            program = environment / "bin" / "gptutor"
            program.parent.mkdir(parents=True)
            program.write_text(PROGRAM.format(python=sys.executable, release=str(environment.parent)))
            program.chmod(0o755)
        elif "compileall" in command:  # most of the bytecode may be here already
            package = Path(command[-1])
            for cache in (ROOT / "gptutor").rglob("__pycache__"):
                shutil.copytree(cache, package / cache.relative_to(ROOT / "gptutor"))
            Machine.run(self, [sys.executable, *command[1:]])


def install(clone: Path, root: Path, *, release: str | None = None, reuse: bool) -> None:
    """`gptutor install-service` of the clone. Raises Failed, InstallError."""
    if reuse:
        machine = ReusingMachine(root)
        wanted = Installation(clone, release=release)
        version = (clone / "gptutor" / "__init__.py").read_text().rpartition("= ")[2].strip().strip('"')
        with mock.patch.object(installation, "__version__", version):  # of the clone, whose own code would do this
            list(carry_out(make_plan(wanted, machine, look(wanted, machine)), machine))
        return
    command = [sys.executable, "-m", "gptutor", "install-service", "--root", str(root)]
    done = subprocess.run(
        [*command, *(["--release", release] if release else [])],
        cwd=clone,
        stdin=subprocess.DEVNULL,
        text=True,
        capture_output=True,
    )
    require(done.returncode == 0, f"The installation failed: {done.stdout}{done.stderr}")


def program_of(root: Path, release: str | None = None) -> Path:
    """The program of an installed release; of the one that runs, through the link `current`."""
    return root / PREFIX.lstrip("/") / (f"releases/{release}" if release else "current") / ".venv" / "bin" / "gptutor"
