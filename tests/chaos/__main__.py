"""`python -m tests.chaos COUNT [FIRST SEED]`: so many runs, one after the other; a line for each."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.harness import run


def main(count: int, first: int) -> int:
    failures = 0
    for seed in range(first, first + count):
        root = Path(tempfile.mkdtemp(prefix=f"plexd-chaos-{seed}-"))
        report = run(seed, root / "run")
        print(report, flush=True)
        if report.problems:
            failures += 1
            print(f"  kept: {root}", flush=True)
        else:
            shutil.rmtree(root)
    print(f"{count} runs, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
