"""A disk that is small enough to be filled."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEGABYTE = 1 << 20
SIZE_MB = 48
FREE_BYTES_MIN = 8 * MEGABYTE
"""With less room the service must tell it."""
BALLAST = "ballast"


@contextmanager
def mounted(folder: Path) -> Iterator[bool]:
    """A file system in memory, on that folder, and whether there is one: only root may mount it."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={SIZE_MB}m,mode=0750", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], check=False, capture_output=True).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Writes until there is no room for a single byte."""
    with (folder / BALLAST).open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(MEGABYTE))
    with (folder / BALLAST).open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x")


def free(folder: Path) -> None:
    (folder / BALLAST).unlink()
