"""`python -m tests.fuzz TARGET --seconds 60`: ends with 0 if nothing was found, else after showing the input that fails."""

import argparse
import logging
import sys
from pathlib import Path

from tests.fuzz.engines import HAS_ATHERIS, run_atheris, run_hypothesis_for

if HAS_ATHERIS:
    import atheris

    with atheris.instrument_imports(
        include=["gptutor"], enable_loader_override=False
    ):  # so that it sees which branches are reached
        from tests.fuzz.targets import TARGETS
else:
    from tests.fuzz.targets import TARGETS


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Bytes that nobody meant, for what reads bytes.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60, help="how long (60)")
    parser.add_argument("--seed", type=int, default=1, help="the dice (1)")
    parser.add_argument("--engine", choices=["atheris", "hypothesis"], default="atheris" if HAS_ATHERIS else "hypothesis")
    parser.add_argument("--corpus", type=Path, help="directory that keeps what reaches new branches, from one run to the next")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    target = TARGETS[chosen.target]
    logging.getLogger("gptutor").setLevel(logging.CRITICAL)
    print(f"{chosen.target}: {chosen.seconds} s of {chosen.engine}", flush=True)
    if chosen.engine == "atheris":
        sys.exit(run_atheris(target, seconds=chosen.seconds, seed=chosen.seed, corpus=chosen.corpus))
    runs = run_hypothesis_for(target, seconds=chosen.seconds, seed=chosen.seed)
    print(f"{runs} runs, nothing found")
    sys.exit(0)


if __name__ == "__main__":
    main()
