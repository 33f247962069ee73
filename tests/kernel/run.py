"""`make test-kernel`: the tests of this directory, run by pytest inside the guest. Arguments are pytest's."""

from __future__ import annotations

import platform
import sys
import time

from tests.kernel.guest import boot
from tests.kernel.image import REPO, Image, ImageError, kernel_image

DEADLINE_SECONDS = 1200
WITHOUT_IPV6 = "tests/kernel/without_ipv6"
PYTEST = [
    str(REPO / ".venv/bin/python"), "-m", "pytest", "-m", "kernel", "-v", "--durations=5",
    # what imports slowly and serves nothing in there: other plugins, the conftest of all tests (hypothesis), a cache
    "--disable-plugin-autoload", "-p", "pytest_timeout", "--confcutdir", "tests/kernel", "-p", "no:cacheprovider",
]  # fmt: skip


def main(arguments: list[str]) -> int:
    if platform.machine() != "x86_64":
        print(f"kernel lane: SKIPPED, it boots an amd64 kernel and this is {platform.machine()}")
        return 0
    try:
        image = kernel_image()
    except ImageError as exc:
        print(f"kernel lane: {exc}", file=sys.stderr)
        return 1
    if not arguments:
        return _run(image, ["tests/kernel", "--ignore", WITHOUT_IPV6]) or _run(image, [WITHOUT_IPV6])
    return _run(image, arguments)


def _run(image: Image, arguments: list[str]) -> int:
    """The exit status of pytest in a guest of its own."""
    begun = time.monotonic()
    parameters = ["ipv6.disable=1"] if any(argument.startswith(WITHOUT_IPV6) for argument in arguments[:1]) else []
    print(f"kernel lane: booting Linux {image.release} in QEMU, emulated", *parameters, flush=True)
    verdict = boot(image, [*PYTEST, *arguments], DEADLINE_SECONDS, parameters)
    took = time.monotonic() - begun
    if verdict.status is None:
        print(f"kernel lane: FAILED after {took:.0f} s, the guest gave no verdict: {verdict.reason}", file=sys.stderr)
        return 1
    print(f"kernel lane: exit status {verdict.status} after {took:.0f} s")
    return verdict.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
