"""The audit log of a Kubernetes API server on this host (docs/contract/telemetry.md §5.7)."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from plexd.audit import kubernetes
from plexd.linux.logfiles import FilePosition
from plexd.linux.tail import Hole, Item, Line, Oversized, Tail
from plexd.log import get_logger
from plexd.store.cursors import Cursors
from plexd.telemetry.audit_encoder import AuditEncoder
from plexd.telemetry.counters import Dropped
from plexd.telemetry.gaps import Reason
from plexd.telemetry.pipeline import Pipeline, SourceQueue, SourceState

log = get_logger("telemetry")

MANIFEST = Path("/etc/kubernetes/manifests/kube-apiserver.yaml")
USUAL_PATH = Path("/var/log/kubernetes/audit/audit.log")
MAX_LINE = 4 << 20
ABSENT_SECONDS = 60.0
BURST = 64  # lines in one go before others have their turn
OFF_LOOP_BYTES = 256 << 10  # taking more than this apart stalls the loop

_ARGUMENT = re.compile(r"--audit-log-path=([^\s\"',\]]+)")


def find_log(manifest: Path = MANIFEST) -> Path:
    """Where the API server of this host writes its audit log, if there is one. Blocks."""
    try:
        match = _ARGUMENT.search(manifest.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        match = None
    return Path(match[1]) if match is not None and match[1].startswith("/") else USUAL_PATH


class KubernetesAudit:
    """A source; the positions it keeps are those of lines whose fate is known. `interval` is in seconds."""

    name = kubernetes.SOURCE

    def __init__(
        self,
        pipeline: Pipeline,
        cursors: Cursors,
        form: AuditEncoder,
        selection: kubernetes.Selection,
        locate: Callable[[], Path],
        interval: float,
        *,
        is_expected: bool = False,
    ) -> None:
        """`is_expected`: a log that is not there is worth a line."""
        self._pipeline = pipeline
        self._cursors = cursors
        self._form = form
        self._selection = selection
        self._locate = locate
        self._interval = interval
        self._is_expected = is_expected
        self._path: Path | None = None
        self._mark: FilePosition | None = None
        stored = cursors.register("k8s_audit", self._position)
        self._feed: SourceQueue[FilePosition] = pipeline.feed(self.name, self._settled)
        self._feed.row.state = SourceState.ABSENT
        self._feed.row.position = lambda: "" if self._mark is None else f"{self._mark.inode}:{self._mark.offset}"
        with contextlib.suppress(KeyError, TypeError, ValueError):
            self._path = Path(stored["path"])
            self._mark = FilePosition.parse(stored)

    async def collect(self) -> None:
        path = await asyncio.to_thread(self._locate)
        if path != self._path:
            self._mark = None
        is_new = self._path is None
        self._path = path
        tail = Tail(path, self._mark, MAX_LINE, at_end=is_new)
        is_gap = self._cursors.was_corrupt and is_new
        self._cursors.touch()  # from now on the path is known: a file that appears there is new as a whole
        try:
            while True:
                items = await asyncio.to_thread(tail.read, self._pipeline.monotonic())
                self._feed.row.state = SourceState.READING if tail.is_there else SourceState.ABSENT
                if self._mark is None and tail.began is not None:
                    self._settled(tail.began)
                    if is_gap:
                        await self._feed.gap(Reason.CORRUPT_STATE, None, tail.began)
                for number, item in enumerate(items):
                    await self._take(item)
                    if number % BURST == BURST - 1:
                        await asyncio.sleep(0)
                if self._is_expected and not tail.is_there:
                    log.warning(
                        "kubernetes audit log not there", path=str(path), next_step="it is looked for each minute"
                    )
                    self._is_expected = False
                if not items:
                    await asyncio.sleep(self._interval if tail.is_there else ABSENT_SECONDS)
        finally:
            tail.close()

    async def _take(self, item: Item) -> None:
        match item:
            case Hole(reason, mark):
                await self._feed.gap(Reason(reason.value), None, mark)
            case Oversized(mark):
                self._feed.lose(Dropped.OVERSIZE, mark)
            case Line(text, mark) if not text.strip():
                self._feed.skip_empty(mark)
            case Line(text, mark):
                await self._take_event(text, mark)

    async def _take_event(self, text: bytes, mark: FilePosition) -> None:
        try:
            write = partial(self._write, text, self._pipeline.now())
            written = write() if len(text) < OFF_LOOP_BYTES else await asyncio.to_thread(write)
        except kubernetes.Malformed:
            self._feed.lose(Dropped.MALFORMED, mark)
            return
        if written is None:
            self._feed.skip_filtered(mark)
            return
        body, cut = written
        if cut:
            self._feed.note_truncated()
        await self._feed.put(body, mark)

    def _write(self, text: bytes, now: float) -> tuple[bytes, bool] | None:
        entry = kubernetes.normalise(text.decode("utf-8", "replace"), self._selection, self._form.hostname, now)
        return None if entry is None else self._form.write(entry)

    # positions

    def _settled(self, mark: FilePosition) -> None:
        self._mark = mark
        self._cursors.touch()

    def _position(self) -> Any:
        if self._path is None:
            return None
        return {"path": str(self._path)} | (self._mark._asdict() if self._mark is not None else {})
