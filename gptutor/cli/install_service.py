"""`gptutor install-service`: installs the service on this machine, or brings what is installed up to date. It says each step."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from gptutor.cli.console import err, fail, out, shown
from gptutor.cli.installation import PREFIX, Installation, Plan, check_python, look, make_plan
from gptutor.cli.installation_steps import InstallError, Machine, Step

SYSTEMD = Path("/run/systemd/system")
"""Exists where systemd is in charge."""
CLONE = Path(__file__).resolve().parent.parent.parent


def install_service(
    prefix: Annotated[str, typer.Option(help="Where the releases are.")] = PREFIX,
    release: Annotated[
        str | None, typer.Option(help="An installed release to run, such as the one before: to go back, or forward again.")
    ] = None,
    data_from: Annotated[
        Path | None, typer.Option(help="Take over the data of a service that ran from another folder: its var.")
    ] = None,
    root: Annotated[
        Path, typer.Option(help="A folder that stands for /, for a trial: without systemd, and as an ordinary user.")
    ] = Path("/"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the steps, and change nothing.")] = False,
) -> None:
    """Install the service with systemd, from a clone; run it again after an update. A second run changes nothing."""
    machine = Machine(root.absolute())
    prefix = "/" + prefix.strip("/")
    if machine.is_this_one and os.geteuid() != 0 and not dry_run:
        fail(
            "This changes the system: run it with sudo. Without: --dry-run shows the steps, --root FOLDER tries them in a folder."
        )
    if machine.is_this_one and not SYSTEMD.is_dir() and not dry_run:
        fail("There is no systemd here. Run the service with: make run, or in a container (deploy/compose.yaml).")
    wanted = Installation(CLONE, prefix, release, data_from.absolute() if data_from else None)
    try:
        if machine.is_this_one:
            check_python(Path(sys.base_prefix))
        plan = make_plan(wanted, machine, look(wanted, machine))
        changed = 0
        for step, what in carry_out(plan, machine, dry_run=dry_run, around=_shown_while_made):
            changed += what in ("done", "to do")
            out.print(f"  {what:<8} {shown(step.text)}", highlight=False)
    except InstallError as error:
        fail(str(error))
    out.print(_sum(changed, dry_run=dry_run), highlight=False)
    for note in plan.notes:
        out.print(shown(note), highlight=False)


def _shown_while_made(step: Step) -> AbstractContextManager[object]:
    return err.status(shown(step.text))


def carry_out(
    plan: Plan, machine: Machine, *, dry_run: bool = False, around: Callable[[Step], AbstractContextManager[object]] = nullcontext
) -> Iterator[tuple[Step, str]]:
    """Each step, after it was made, and what became of it: `done`, `to do` in a dry run, `holds` or `skipped`.

    What holds is decided before the first change. Raises InstallError.
    """
    needed = [not _holds(step, machine) for step in plan.steps]
    umask = os.umask(0o022)
    try:
        for step, is_needed in zip(plan.steps, needed, strict=True):
            if step.needs_system and not machine.is_this_one:
                yield step, "skipped"
            elif not is_needed:
                yield step, "holds"
            elif dry_run:
                yield step, "to do"
            else:
                with around(step):
                    step.make(machine)
                yield step, "done"
    finally:
        os.umask(umask)


def _holds(step: Step, machine: Machine) -> bool:
    """A dry run by an ordinary user cannot see everything; then the step is listed."""
    if step.needs_system and not machine.is_this_one:
        return False
    try:
        return step.holds(machine)
    except PermissionError:
        return False


def _sum(changed: int, *, dry_run: bool) -> str:
    if not changed:
        return "Everything is as it should be; nothing was changed."
    return f"{changed} steps to do; nothing was changed." if dry_run else f"{changed} steps done."
