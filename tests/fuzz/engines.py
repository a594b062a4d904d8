"""Two fuzzing engines: atheris, guided by branch coverage, and Hypothesis, which is available on every machine."""

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

HAS_ATHERIS = importlib.util.find_spec("atheris") is not None
INPUT_BYTES_MAX = 4096
BATCH = 2000


def inputs(target: "Target") -> st.SearchStrategy[bytes]:
    """Random bytes, and seeds with random edits."""
    edits = st.lists(st.tuples(st.integers(0, INPUT_BYTES_MAX), st.integers(0, 8), st.binary(max_size=8)), max_size=6)
    return st.one_of(st.binary(max_size=200), st.builds(edited, st.sampled_from(target.seeds), edits))


def edited(seed: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for index, size, new in edits:
        index %= len(seed) + 1
        seed = seed[:index] + new + seed[index + size :]
    return seed


def run_hypothesis(target: "Target", *, runs: int, seed: int) -> None:
    """Raises what the target raises for the smallest failing input that was found."""

    @seeded(seed)
    @settings(
        max_examples=runs,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(inputs(target))
    def claim(data: bytes) -> None:
        target.run(data)

    for start in target.seeds:
        target.run(start)
    claim()


def run_hypothesis_for(target: "Target", *, seconds: float, seed: int) -> int:
    """Returns the number of runs. Raises what the target raises."""
    deadline = time.monotonic() + seconds
    batches = 0
    while time.monotonic() < deadline:
        run_hypothesis(target, runs=BATCH, seed=seed + batches)
        batches += 1
    return batches * BATCH


def run_atheris(target: "Target", *, seconds: int, seed: int, corpus: Path | None) -> int:
    """Returns the exit code: 0, or another after a failing input was printed and written to the corpus directory.

    libFuzzer ends its process without returning to Python, so it runs in a child process.
    """
    directory = corpus or Path(tempfile.mkdtemp(prefix="gptutor-fuzz-"))
    directory.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(target.seeds):
        (directory / f"seed-{number}").write_bytes(start)
    child = os.fork()
    if child == 0:
        _fuzz(target, directory, f"-max_total_time={seconds}", f"-seed={seed}")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if corpus is None and code == 0:
        shutil.rmtree(directory)
    return code


def _fuzz(target: "Target", directory: Path, *arguments: str) -> None:
    """Never returns."""
    import atheris

    bounds = (f"-max_len={INPUT_BYTES_MAX}", "-timeout=10", "-rss_limit_mb=1024", f"-artifact_prefix={directory}/")
    atheris.Setup([sys.argv[0], *arguments, *bounds, str(directory)], target.run)
    atheris.Fuzz()
