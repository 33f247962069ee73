"""Kill -9 at every boundary between two system calls of a write.

The work runs in a forked process in which opening, writing, syncing, renaming and deleting count; at the chosen number
it kills itself. A write counts twice, since the kernel may have taken only a part of it.
"""

from __future__ import annotations

import itertools
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import IO, Any


def crashes(work: Callable[[int], object], prepare: Callable[[int], object] = lambda n: None) -> Iterator[int]:
    """Run `work(n)` for n = 0, 1, … in a process killed at its n-th boundary, until one comes through.

    `prepare(n)` runs before, without danger. Yields n after each death, for the caller to look at what is left.
    """
    for n in itertools.count():
        prepare(n)
        if not _dies(n, work):
            return
        yield n


def _dies(n: int, work: Callable[[int], object]) -> bool:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _arm(n)
            work(n)
            status = 0
        except BaseException:  # this process must not become a second pytest
            traceback.print_exc()
        finally:
            os._exit(status)
    _, wait_status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(wait_status):
        assert os.WTERMSIG(wait_status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(wait_status) == 0, "the work failed by itself"
    return False


def _arm(n: int) -> None:
    left = n

    def boundary() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            boundary()
            return call(*args, **kwargs)

        return replacement

    for name in ("open", "fsync", "rename", "unlink", "mkdir", "close"):
        setattr(os, name, counted(getattr(os, name)))
    pwrite = os.pwrite

    def written_in_part(file: int, data: Any, offset: int) -> int:
        boundary()
        return pwrite(file, data[: max(len(data) // 2, 50)], offset)

    os.pwrite = written_in_part
    fdopen = os.fdopen
    os.fdopen = lambda *args, **kwargs: _SlowFile(fdopen(*args, **kwargs), boundary)  # type: ignore[assignment]


class _SlowFile:
    """A file that writes in two halves."""

    def __init__(self, file: IO[Any], boundary: Callable[[], None]) -> None:
        self._file, self._boundary = file, boundary

    def __enter__(self) -> _SlowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._boundary()
            self._file.write(part)
            self._file.flush()

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()
