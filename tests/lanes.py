"""`make test`: the tests in a few lanes side by side, since most of their time is waiting. Arguments are pytest's.

A lane is a pytest with a network, a process tree and a /run of its own, so that lanes cannot meet. Only what listens to
the kernel's audit system runs where it was started: that one speaks in the machine's first namespaces alone.
Where namespaces cannot be had (without root, in some containers), one pytest runs everything.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
OUTPUT = REPO / ".cache" / "lanes"
EVERYTHING = ["tests"]
AUDIT = ["tests/linux/test_audit.py", "tests/telemetry/test_audit_kernel.py", "tests/telemetry/test_audit_killed.py"]
LANES = {  # of about the same length; what they do not name is one more
    "faults": ["tests/faults"],
    "labs": ["tests/lab", "tests/nat", "tests/tunnel"],
    "chaos": ["tests/chaos", "tests/policy", "tests/rotation"],
}
PYTEST = [sys.executable, "-m", "pytest", "-m", "not kernel"]
APART = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-ec"]
# the shell stays, as process 1 that reaps what tests leave behind
STAGE = 'mount -t tmpfs tmpfs /run; mkdir -p /run/netns /run/lock; ip link set lo up; "$@"; exit $?'
GRACE_SECONDS = 60.0  # for tests that are interrupted to take down what they built


class Lane:
    """A pytest that has been started."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._output = OUTPUT / f"{name}.log"
        self._begun = time.monotonic()
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command, cwd=REPO, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def status(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def show(self) -> None:
        print(f"\n===== lane {self.name}, {time.monotonic() - self._begun:.0f} s\n", flush=True)
        with self._output.open("rb") as output:
            shutil.copyfileobj(output, sys.stdout.buffer)
        sys.stdout.flush()

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def wait(self, seconds: float) -> None:
        """Raises TimeoutExpired."""
        self._process.wait(seconds)


def main(arguments: list[str]) -> int:
    if reason := _why_not_apart():
        print(f"lanes: one for everything, for there are no namespaces: {reason}", flush=True)
        return subprocess.run([*PYTEST, *arguments, *EVERYTHING], cwd=REPO, check=False).returncode
    OUTPUT.mkdir(parents=True, exist_ok=True)
    pytest = [*PYTEST, "-p", "no:cacheprovider", f"--color={'yes' if sys.stdout.isatty() else 'no'}", *arguments]
    named = [*AUDIT, *itertools.chain.from_iterable(LANES.values())]
    apart = LANES | {"rest": [*(f"--ignore={path}" for path in named), *EVERYTHING]}
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # what started us in the background may have had the first ignored, for tests as well
        signal.signal(number, signal.default_int_handler)
    lanes = [Lane("audit", [*pytest, *AUDIT])]
    lanes += [Lane(name, [*APART, STAGE, "sh", *pytest, *what]) for name, what in apart.items()]
    print(f"lanes: each shows its output at its end; meanwhile tail -f {OUTPUT}/*.log", flush=True)
    running = list(lanes)
    try:
        while running:
            time.sleep(0.2)
            for lane in [lane for lane in running if lane.status is not None]:
                running.remove(lane)
                lane.show()
    except KeyboardInterrupt:
        _interrupt(running)
        return 128 + signal.SIGINT
    failed = [f"{lane.name} (exit status {lane.status})" for lane in lanes if lane.status]
    print("\nlanes:", f"FAILED: {', '.join(failed)}" if failed else "all passed", flush=True)
    return 1 if failed else 0


def _why_not_apart() -> str:
    """Empty if it can be done."""
    try:
        tried = subprocess.run([*APART, STAGE, "sh", "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError as exc:
        return str(exc)
    return (tried.stderr.strip() or f"exit status {tried.returncode}") if tried.returncode else ""


def _interrupt(lanes: list[Lane]) -> None:
    """Let them tidy up; who interrupts again has them killed at once."""
    try:
        for lane in lanes:
            lane.signal(signal.SIGINT)
        deadline = time.monotonic() + GRACE_SECONDS
        for lane in lanes:
            lane.wait(max(0.0, deadline - time.monotonic()))
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        print("lanes: killed", flush=True)
    finally:
        for lane in lanes:
            lane.signal(signal.SIGKILL)
            lane.show()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
