"""The compiled half of the benchmark: OpenRouter's stand-in and the callers (`bench/rig`, in Go)."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parent / "rig"


@dataclass(frozen=True, slots=True)
class Authority:
    """Files in PEM: who signed, and a certificate of his for localhost, with its key."""

    authority: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Seen:
    """What callers saw; times in milliseconds."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    first_byte_p50_ms: float
    first_byte_p99_ms: float


def built(directory: Path) -> Path:
    """Compiles it. Raises RuntimeError, with a sentence."""
    if shutil.which("go") is None:
        raise RuntimeError("The benchmark's callers are written in Go. On Debian or Ubuntu: apt install golang-go")
    binary = directory / "rig"
    subprocess.run(["go", "build", "-o", str(binary), "."], cwd=SOURCE, check=True)
    return binary


@contextmanager
def upstream(rig: Path, models: Path, tls: Authority | None = None) -> Iterator[int]:
    """The stand-in on a port of its own."""
    command = [str(rig), "upstream", "-models", str(models)]
    if tls is not None:
        command += ["-cert", str(tls.certificate), "-key", str(tls.key)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def start_load(rig: Path, url: str, keys: Path | None, kind: str, callers: int, seconds: float) -> subprocess.Popen[str]:
    command = [str(rig), "load", "-url", url, "-kind", kind, "-callers", str(callers), "-seconds", str(seconds)]
    if keys is not None:
        command += ["-keys", str(keys)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def seen(load: subprocess.Popen[str]) -> Seen:
    """Waits for its end. Raises RuntimeError if a single request went wrong."""
    output, _ = load.communicate()
    said = json.loads(output)
    if said.pop("errors"):
        raise RuntimeError(f"A request failed: {said['first_error']}")
    del said["first_error"]
    return Seen(**said)
