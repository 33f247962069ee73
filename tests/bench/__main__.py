"""`make bench`: prints every figure; `python -m tests.bench kernel_peers` only those of the modules named."""

from __future__ import annotations

import importlib
import sys

SUBJECTS = ("kernel_peers", "event", "damage", "firewall", "agent", "rotation", "metrics", "logs")


def main(subjects: list[str]) -> int:
    for subject in subjects or SUBJECTS:
        print(f"measuring {subject}", flush=True)
        for figure in importlib.import_module(f"tests.bench.{subject}").measure():
            print(figure.line(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
