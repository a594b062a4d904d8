"""Room for what the service writes: a full disk stops every purchase, because each begins with a line of the journal."""

import asyncio
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from gptutor.telemetry.alerts import ALERTS

LOGGER = logging.getLogger("gptutor.disk")
JOURNAL_SHARE_MAX = 0.8
"""Of `recovery.journal_bytes_max`; at the whole of it nothing is bought any more."""
GIGABYTE = 1 << 30


async def watch_disk(folders: Iterable[Path], free_bytes_min: int, journal_share: Callable[[], float], *, every_s: float) -> None:
    """Runs until cancelled. `journal_share` is how full the journal is, from 0 to 1."""
    watched = [*folders]
    while True:
        free = await asyncio.to_thread(free_bytes, watched)
        report_room(free, free_bytes_min, journal_share())
        await asyncio.sleep(every_s)


def free_bytes(folders: Iterable[Path]) -> dict[Path, int]:
    """How much each folder's disk has left for us; a folder that is not there has no entry."""
    free = {}
    for folder in folders:
        try:
            free[folder] = shutil.disk_usage(folder).free
        except FileNotFoundError:
            continue  # nothing is written there yet
        except OSError as error:
            LOGGER.warning("The free space of %s cannot be read: %s", folder, error.strerror)
    return free


def report_room(free: dict[Path, int], free_bytes_min: int, journal_share: float) -> None:
    low = [f"{folder.absolute()} has {size / GIGABYTE:.2f} GB left" for folder, size in free.items() if size < free_bytes_min]
    ALERTS.report("disk_nearly_full", f"The disk is nearly full: {', '.join(low)}" if low else None)
    text = f"The journal is {journal_share:.0%} full, because PostgreSQL does not take it; when it is full nothing is bought"
    ALERTS.report("journal_nearly_full", text if journal_share > JOURNAL_SHARE_MAX else None)
