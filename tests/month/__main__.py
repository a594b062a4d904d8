"""`python -m tests.month`: an operator's month. Exits with 1, and a sentence for each fault, unless all went as it must."""

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from gptutor.cli.installation import DATA
from gptutor.cli.installation_steps import InstallError
from tests.chaos.processes import free_port, postgres, simulator
from tests.month import small_disk
from tests.month.database import Database
from tests.month.receiver import receiver
from tests.month.service import Service
from tests.month.story import Month
from tests.month.waiting import Failed

CALMS = 9
"""How often nothing happens for a while, with five replacements and three others."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.month", description="Plays an operator's month with real processes, under load."
    )
    parser.add_argument("--seconds", type=float, default=60, help="how long nothing but requests happens, in all (default: 60)")
    parser.add_argument("--per-second", type=float, default=100, help="requests a second (default: 100)")
    parser.add_argument("--replacements", type=int, default=5, help="replacements before the update (default: 5)")
    parser.add_argument(
        "--reuse", action="store_true", help="do not make an environment for each release, but use this one's packages"
    )
    parser.add_argument("--cluster", type=Path, help="a stopped PostgreSQL's data, migrated, to be used (default: a new one)")
    parser.add_argument("--keep", action="store_true", help="keep the directory with the logs")
    return parser.parse_args()


class Story:
    """Prints what happens, and when."""

    def __init__(self) -> None:
        self._began_at = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began_at:6.1f} s  {text}", flush=True)


async def run(
    arguments: argparse.Namespace, directory: Path, root: Path, database: Database, *, has_small_disk: bool
) -> list[str]:
    """Returns all that is wrong, in sentences. Raises Failed, InstallError."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    ports = random.Random()
    async with simulator(free_port(ports), directory / "simulator.out") as simulator_url, receiver() as receiving:
        service = Service(root, directory, free_port(ports))
        with contextlib.closing(service):
            month = Month(
                directory,
                root,
                database,
                simulator_url,
                receiving,
                service,
                Story().say,
                calm_s=arguments.seconds / CALMS,
                per_second=arguments.per_second,
                replacements=arguments.replacements,
                has_small_disk=has_small_disk,
                reuse=arguments.reuse,
            )
            try:
                return await month.play()
            except (Failed, InstallError):
                for line in service.errors()[-5:]:
                    print(f"  log: {line['message']}", flush=True)
                raise


def main() -> int:
    arguments = parse_arguments()
    with contextlib.ExitStack() as stack:
        if arguments.keep:
            directory = Path(tempfile.mkdtemp(prefix="gptutor-month-"))
            print(f"kept in {directory}", flush=True)
        else:
            directory = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="gptutor-month-", ignore_cleanup_errors=True))
            )
        root = directory / "root"
        has_small_disk = stack.enter_context(small_disk.mounted(root / DATA.lstrip("/")))
        server = stack.enter_context(postgres(arguments.cluster or directory / "postgres"))
        try:
            wrong = asyncio.run(run(arguments, directory, root, Database(server), has_small_disk=has_small_disk))
        except asyncio.CancelledError:
            print("Interrupted; all processes are stopped.")
            return 130
        except (Failed, InstallError) as error:
            wrong = [str(error)]
    for sentence in wrong:
        print(f"ERROR {sentence}")
    if wrong:
        return 1
    print("A month has passed: no request failed, every bill is charged once, and the operator knows everything.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
