"""The machine and this program on it: what registration says of them, and how the process sets itself up."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import resource
import sys
from pathlib import Path

import plexd

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
OPEN_FILES = 65536
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGE_BLOCK = 128 << 10  # bytes; glibc's own beginning
BYTE_CODE = {".pyc", ".pyo"}


def architecture() -> str:
    """`amd64` or `arm64`; the kernel's own word on any other machine."""
    machine = os.uname().machine
    return ARCHITECTURES.get(machine, machine)


def kernel_release() -> str:
    return os.uname().release


def is_container() -> bool:
    """Whether the root of the file system is an image's."""
    marks = (Path("/.dockerenv"), Path("/run/.containerenv"))
    return any(mark.exists() for mark in marks) or "KUBERNETES_SERVICE_HOST" in os.environ


def program_checksum() -> str:
    """`sha256:` and 64 hex digits over the running program, never over the interpreter. Blocks to read it all.

    One file (frozen, or a zip application) is hashed as it is; of an installed package every file counts, except
    byte code, which the interpreter makes itself.
    """
    package = Path(plexd.__file__).parent
    if getattr(sys, "frozen", False):
        return _prefixed(_digest(Path(sys.executable)))
    if not package.is_dir():  # inside a zip application
        return _prefixed(_digest(next(path for path in package.parents if path.is_file())))
    return package_checksum(package)


def package_checksum(package: Path) -> str:
    """SHA-256 over lines of relative path and SHA-256 of each file, sorted bytewise."""
    lines = sorted(
        os.fsencode(path.relative_to(package)) + f" {_digest(path)}\n".encode()
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in BYTE_CODE
    )
    return _prefixed(hashlib.sha256(b"".join(lines)).hexdigest())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prefixed(digest: str) -> str:
    return f"sha256:{digest}"


def prepare_process() -> None:
    """Set the process up as a daemon that holds secrets (docs/contract/operations.md §5)."""
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    # what it holds in memory is nobody's to read, not even by a debugger of the same user
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    # orphans of what it runs come to it instead of to init; where the kernel refuses, they do not
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _give_memory_back()
    os.chdir("/")


def _give_memory_back() -> None:
    """Have glibc return what is free; any other C library is left alone.

    It keeps a heap for every thread, and after each large block freed it takes larger ones from there. With the state
    of ten thousand peers coming and going every minute, in whichever thread, that adds up to 50 MB of nothing.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, LARGE_BLOCK), (M_TRIM_THRESHOLD, LARGE_BLOCK)):
            mallopt(parameter, value)
