"""`python -m tests.chaos COUNT [--first SEED] [--at-once RUNS]`: so many runs; a line for each."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor

from tests.chaos.harness import run_and_clear


def main(count: int, first: int, at_once: int) -> int:
    with ProcessPoolExecutor(at_once, max_tasks_per_child=1) as runs:
        kept = list(runs.map(run_and_clear, range(first, first + count)))
    print(f"{count} runs, {kept.count(False)} failed")
    return 0 if all(kept) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side")
    arguments = parser.parse_args()
    sys.exit(main(arguments.count, arguments.first, arguments.at_once))
