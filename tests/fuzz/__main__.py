"""`python -m tests.fuzz TARGET --seconds 60`: exits with 0 if no failure was found, else prints the failing input."""

import argparse
import logging
import sys
from pathlib import Path

from tests.fuzz.engines import HAS_ATHERIS, run_atheris, run_hypothesis_for

if HAS_ATHERIS:
    import atheris

    with atheris.instrument_imports(include=["gptutor"], enable_loader_override=False):  # coverage guides the fuzzer
        from tests.fuzz.targets import TARGETS
else:
    from tests.fuzz.targets import TARGETS


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the code that parses external input.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60, help="duration (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="random seed (default: 1)")
    parser.add_argument("--engine", choices=["atheris", "hypothesis"], default="atheris" if HAS_ATHERIS else "hypothesis")
    parser.add_argument("--corpus", type=Path, help="directory of inputs that reach new branches, kept for later runs")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    target = TARGETS[arguments.target]
    logging.getLogger("gptutor").setLevel(logging.CRITICAL)
    print(f"{arguments.target}: {arguments.seconds} s of {arguments.engine}", flush=True)
    if arguments.engine == "atheris":
        sys.exit(run_atheris(target, seconds=arguments.seconds, seed=arguments.seed, corpus=arguments.corpus))
    runs = run_hypothesis_for(target, seconds=arguments.seconds, seed=arguments.seed)
    print(f"{runs} runs, no failure found")
    sys.exit(0)


if __name__ == "__main__":
    main()
