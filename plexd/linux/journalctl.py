"""journalctl as a child: lines of JSON from its pipe, read as fast as somebody wants them (docs/contract/telemetry.md
§4.4).

`--merge` and `--no-tail`, because `--follow` alone shows only the current boot. A cursor is always asked for with
`--cursor`, which shows the entry it names: `--after-cursor` skips an entry when that one is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

PROGRAM = "journalctl"
FIELDS = "MESSAGE,PRIORITY,_SYSTEMD_UNIT,UNIT,_TRANSPORT"
CHUNK_BYTES = 64 << 10
CHECK_SECONDS = 30.0
END_SECONDS = 5.0
REASON_BYTES = 300


class JournalEnded(Exception):
    """journalctl has ended although it was to follow; the text is what it said."""


def is_installed() -> bool:
    return shutil.which(PROGRAM) is not None


async def first_line(cursor: str, directory: Path | None) -> bytes:
    """The entry that is found when the journal is asked for a cursor; empty when there is none."""
    async with _running([*_arguments(directory), f"--cursor={cursor}"], limit=1 << 20) as (process, _):
        assert process.stdout is not None  # noqa: S101 - asked for
        with contextlib.suppress(TimeoutError, ValueError):  # a line longer than the limit is not one we have sent
            async with asyncio.timeout(CHECK_SECONDS):
                return await process.stdout.readline()
        return b""


@asynccontextmanager
async def follow(
    *, cursor: str = "", since_usec: int | None = None, directory: Path | None = None
) -> AsyncIterator[AsyncIterator[bytes]]:
    """Chunks of output, from the entry that `cursor` names on, else from `since_usec` on (microseconds since 1970).

    Reading them raises JournalEnded when journalctl ends.
    """
    arguments = [*_arguments(directory), "--follow"]
    if cursor:
        arguments.append(f"--cursor={cursor}")
    elif since_usec is not None:
        arguments.append(f"--since=@{since_usec // 1_000_000}.{since_usec % 1_000_000:06d}")
    async with _running(arguments, limit=CHUNK_BYTES) as (process, said):
        yield _chunks(process, said)


async def _chunks(process: Process, said: int) -> AsyncIterator[bytes]:
    assert process.stdout is not None  # noqa: S101 - asked for
    while chunk := await process.stdout.read(CHUNK_BYTES):
        yield chunk
    status = await process.wait()
    os.lseek(said, 0, os.SEEK_SET)
    reason = os.read(said, REASON_BYTES).decode("utf-8", "replace").strip()
    raise JournalEnded(f"{PROGRAM} ended with status {status}: {reason or 'it said nothing'}")


def _arguments(directory: Path | None) -> list[str]:
    arguments = [PROGRAM, "--merge", "--no-tail", "--output=json", "--all", "--no-pager", "--quiet"]
    arguments.append(f"--output-fields={FIELDS}")
    return [*arguments, f"--directory={directory}"] if directory is not None else arguments


@asynccontextmanager
async def _running(arguments: Sequence[str], limit: int) -> AsyncIterator[tuple[Process, int]]:
    """The child, and a file with what it complains of: a pipe that nobody reads could hold it up."""
    said = os.memfd_create("journalctl", os.MFD_CLOEXEC)
    try:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=said,
            limit=limit,
            env={"PATH": os.environ.get("PATH", os.defpath)},
        )
        try:
            yield process, said
        finally:
            await _end(process)
    finally:
        os.close(said)


async def _end(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()  # it holds nothing that could be lost
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_SECONDS):
            await process.wait()
    transport = getattr(process, "_transport", None)
    if transport is not None:
        transport.close()
