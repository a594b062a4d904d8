"""Two ways to think up inputs: atheris, guided by the branches that are reached, and Hypothesis, which is everywhere."""

import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

HAS_ATHERIS = importlib.util.find_spec("atheris") is not None
INPUT_BYTES_MAX = 4096
BATCH = 2000


def inputs(target: "Target") -> st.SearchStrategy[bytes]:
    """Any bytes, and seeds with some places changed."""
    edits = st.lists(st.tuples(st.integers(0, INPUT_BYTES_MAX), st.integers(0, 8), st.binary(max_size=8)), max_size=6)
    return st.one_of(st.binary(max_size=200), st.builds(edited, st.sampled_from(target.seeds), edits))


def edited(seed: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for place, size, new in edits:
        place %= len(seed) + 1
        seed = seed[:place] + new + seed[place + size :]
    return seed


def run_hypothesis(target: "Target", *, runs: int, seed: int) -> None:
    """Raises what the target raises, for the smallest input that was found."""

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
    """Gives the number of runs."""
    ends = time.monotonic() + seconds
    batches = 0
    while time.monotonic() < ends:
        run_hypothesis(target, runs=BATCH, seed=seed + batches)
        batches += 1
    return batches * BATCH


def run_atheris(target: "Target", *, seconds: int, seed: int, corpus: Path | None) -> None:
    """Never returns: libFuzzer ends the process, with 0 or, after it has printed an input that fails, with another code."""
    import atheris

    def once(data: bytes) -> Any:
        target.run(data)

    with tempfile.TemporaryDirectory(prefix="gptutor-fuzz-") as made:
        directory = corpus or Path(made)
        directory.mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(target.seeds):
            (directory / f"seed-{number}").write_bytes(start)
        arguments = [
            f"-max_total_time={seconds}",
            f"-seed={seed}",
            f"-max_len={INPUT_BYTES_MAX}",
            "-timeout=10",
            "-rss_limit_mb=1024",
        ]
        atheris.Setup([sys.argv[0], *arguments, f"-artifact_prefix={directory}/", str(directory)], once)
        atheris.Fuzz()
