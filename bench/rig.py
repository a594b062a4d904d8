"""The compiled part of the benchmark, in Go (`bench/rig`): a simulated OpenRouter and a load generator."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parent / "rig"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: a certificate authority, and a certificate for localhost that it signed, with its private key."""

    authority: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What the load generator measured. Times are in milliseconds from sending a request."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    first_byte_p50_ms: float
    first_byte_p99_ms: float


def build_rig(directory: Path) -> Path:
    """Compiles the rig, and returns the binary. Raises RuntimeError if Go is not installed."""
    if shutil.which("go") is None:
        raise RuntimeError("The benchmark's load generator is written in Go. On Debian or Ubuntu: apt install golang-go")
    binary = directory / "rig"
    subprocess.run(["go", "build", "-o", str(binary), "."], cwd=SOURCE, check=True)
    return binary


@contextmanager
def upstream(rig: Path, models: Path, tls: TlsFiles | None = None) -> Iterator[int]:
    """Runs the simulated OpenRouter on a free port, and yields the port."""
    command = [str(rig), "upstream", "-models", str(models)]
    if tls is not None:
        command += ["-cert", str(tls.certificate), "-key", str(tls.key)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def start_load(rig: Path, url: str, keys: Path | None, kind: str, clients: int, seconds: float) -> subprocess.Popen[str]:
    command = [str(rig), "load", "-url", url, "-kind", kind, "-clients", str(clients), "-seconds", str(seconds)]
    if keys is not None:
        command += ["-keys", str(keys)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def load_result(load: subprocess.Popen[str]) -> LoadResult:
    """Waits for the load generator to end. Raises RuntimeError if any request failed."""
    output, _ = load.communicate()
    result = json.loads(output)
    if result.pop("errors"):
        raise RuntimeError(f"A request failed: {result['first_error']}")
    del result["first_error"]
    return LoadResult(**result)
