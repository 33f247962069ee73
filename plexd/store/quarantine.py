"""Batches the control plane refuses, put aside for a person to look at (docs/contract/telemetry.md §2.6)."""

from __future__ import annotations

import contextlib
import gzip
import os
import time
from collections.abc import Sequence
from pathlib import Path

from plexd.store.files import DIRECTORY_MODE, write_whole

MAX_BYTES = 16 << 20  # of the whole directory


def quarantine(directory: Path, pipeline: str, bodies: Sequence[bytes]) -> Path:
    """Write the entries as one gzipped JSON array; the oldest files make room. Blocks; raises OSError."""
    directory.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    raw = gzip.compress(b"[" + b",".join(bodies) + b"]", compresslevel=6)
    now = int(time.time() * 1000)
    path = directory / f"{pipeline}-{now}.json.gz"
    while path.exists():
        now += 1
        path = directory / f"{pipeline}-{now}.json.gz"
    _make_room(directory, len(raw))
    write_whole(path, raw)
    return path


def _make_room(directory: Path, size: int) -> None:
    files: list[tuple[int, int, str]] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                files.append((status.st_mtime_ns, status.st_size, entry.path))
    total = size + sum(length for _, length, _ in files)
    for _, length, path in sorted(files):
        if total <= MAX_BYTES:
            return
        Path(path).unlink(missing_ok=True)
        total -= length
