"""Log files as a source of logs: followed through renaming, truncation and times without an agent.

A path is a sequence of files, read one after the other: what it was before a rotation is read to its end before what
it is now. The position is that of the last line delivered, in whichever of them (docs/contract/telemetry.md §4.5).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plexd.linux import logfiles
from plexd.linux.logfiles import FileId, FilePosition, LogFile
from plexd.log import get_logger
from plexd.store.cursors import Cursors
from plexd.telemetry.gaps import Reason
from plexd.telemetry.lines import Lines
from plexd.telemetry.pipeline import Pipeline, SourceQueue
from plexd.telemetry.records import LogEncoder
from plexd.telemetry.severity import INFO, NAMES, Filter
from plexd.telemetry.timestamps import parse_stamp, split_priority

log = get_logger("telemetry")

NAME = "files"
CHUNK_BYTES = 64 << 10
CYCLE_BYTES = 1 << 20  # of one file before the others have their turn
KEPT_SECONDS = 5.0  # a rotated file may still be written to
UNFINISHED_SECONDS = 30.0  # a last line without newline that no longer grows is taken as it is


class _Tail:
    """One file being read. `offset` lies behind the last line that was taken, `seen` behind what was read."""

    def __init__(self, file: LogFile, offset: int, max_bytes: int) -> None:
        self.file = file
        self.offset = self.seen = offset
        self.lines = Lines(max_bytes)
        self.rotated_at: float | None = None  # monotonic; since when the path names another file
        self.grown_at = 0.0  # monotonic

    def position(self) -> FilePosition:
        return self.file.mark(self.offset)

    def rewind(self) -> None:
        """Read again what was not taken."""
        self.seen = self.offset
        self.lines.clear()


class _Followed:
    """A path: the file it names, last, and the earlier ones that are not read to their end."""

    def __init__(self, path: Path, feed: SourceQueue[FilePosition], form: LogEncoder) -> None:
        self.path = path
        self.feed = feed
        self.form = form
        self.tails: deque[_Tail] = deque()
        self.committed: FilePosition | None = None
        self.last: FilePosition | None = None  # of the newest file that is read to its end

    def learn_fingerprint(self) -> bool:
        """A position in a file that was empty fits any content: name the content, once there is some."""
        committed = self.committed
        if committed is None or logfiles.fingerprint_length(committed.fingerprint):
            return False
        for tail in self.tails:
            if tail.file.id == committed.file and logfiles.fingerprint_length(tail.file.fingerprint):
                self.committed = committed._replace(fingerprint=tail.file.fingerprint)
                return True
        return False

    def close(self) -> None:
        for tail in self.tails:
            tail.file.close()
        self.tails.clear()


class Files:
    """`interval` is in seconds; `from_beginning`: what is there at the very first start is read from its beginning.

    `make_form` gives the form of the entries of a path.
    """

    name = NAME

    def __init__(
        self,
        pipeline: Pipeline,
        cursors: Cursors,
        make_form: Callable[[str], LogEncoder],
        wanted: Filter,
        *,
        patterns: Sequence[str],
        interval: float,
        from_beginning: bool,
        max_line_bytes: int,
    ) -> None:
        self._pipeline = pipeline
        self._cursors = cursors
        self._make_form = make_form
        self._wanted = wanted
        self._patterns = patterns
        self._interval = interval
        self._from_beginning = from_beginning
        self._max_line_bytes = max_line_bytes
        self._row = pipeline.row(NAME)
        self._followed: dict[Path, _Followed] = {}
        self._finished: dict[FileId, FilePosition] = {}  # rotated files read to their end
        stored = cursors.register(NAME, self._stored)
        self._is_first = not isinstance(stored, dict)
        self._known: dict[Path, FilePosition] = _positions(stored)

    def _stored(self) -> Mapping[str, Any]:
        known = dict(self._known)  # not opened yet
        known |= {path: followed.committed for path, followed in self._followed.items() if followed.committed}
        return {str(path): position._asdict() for path, position in known.items()}

    def close(self) -> None:
        """After `collect` was cancelled, for good."""
        for followed in self._followed.values():
            followed.close()

    async def collect(self) -> None:
        for followed in self._followed.values():
            for tail in followed.tails:
                tail.rewind()
        if self._is_first:
            await self._begin()
        loop = asyncio.get_running_loop()
        look_at = loop.time()
        while True:
            if loop.time() >= look_at:
                await self._look()
                look_at = loop.time() + self._interval
            has_more = False
            for followed in list(self._followed.values()):
                has_more |= await self._read(followed)
            if not has_more:
                await asyncio.sleep(max(0.0, look_at - loop.time()))

    async def _begin(self) -> None:
        """The very first start. Where it begins is on disk before anything is read, or a kill would move it on."""
        for path in await asyncio.to_thread(logfiles.find, self._patterns):
            followed = self._follow(path)
            try:
                file = await asyncio.to_thread(LogFile, path)
            except OSError as exc:
                log.info("log file not opened", path=str(path), error=str(exc))
                del self._followed[path]
                continue
            tail = _Tail(file, 0 if self._from_beginning else file.size(), self._max_line_bytes)
            followed.tails.append(tail)
            followed.committed = tail.position()
            if self._cursors.was_corrupt:
                await followed.feed.gap(Reason.CORRUPT_STATE, None, tail.position())
        self._is_first = False
        await self._cursors.save()

    async def _look(self) -> None:
        """Which files there are now, and whether paths name others than before."""
        paths = await asyncio.to_thread(logfiles.find, self._patterns)
        is_news = False
        for path in paths:
            if path not in self._followed and not self._is_read(logfiles.file_id(path)):
                is_news |= path not in self._known
                await self._open(path)
        for path in [path for path in self._known if path not in paths]:
            await self._open(path)  # renamed while nobody looked: its rest may be found
        for followed in list(self._followed.values()):
            await self._notice_rotation(followed)
        if is_news:  # known before anything of them is read: what a rotation makes of them can be found after a kill
            await self._cursors.save()
        self._row.detail = f"{len(self._followed)} files" + (
            f"; positions not saved: {self._cursors.problem}" if self._cursors.problem else ""
        )

    def _is_read(self, identity: FileId | None) -> bool:
        return any(tail.file.id == identity for followed in self._followed.values() for tail in followed.tails)

    def _follow(self, path: Path) -> _Followed:
        followed = self._followed.get(path)
        if followed is None:

            def settled(position: FilePosition) -> None:
                made.committed = position
                made.learn_fingerprint()
                self._cursors.touch()

            feed = self._pipeline.feed(str(path), settled, row=self._row)
            followed = made = self._followed[path] = _Followed(path, feed, self._make_form(str(path)))
        return followed

    async def _open(self, path: Path) -> None:
        """Begin with a path, where an earlier process or another name of the file left off."""
        followed = self._follow(path)
        position = self._known.pop(path, None)
        identity = logfiles.file_id(path)
        if position is None and identity is not None:
            position = self._finished.pop(identity, None)
        followed.committed = position
        if position is None:
            tail = await self._add(followed, None)
            followed.committed = tail.position() if tail is not None else None
        else:
            await self._resume(followed, position, identity)

    async def _resume(self, followed: _Followed, position: FilePosition, identity: FileId | None) -> None:
        if identity == position.file and await self._add(followed, position):
            return
        current = await self._opened(followed.path) if identity is not None else None
        rotated = await self._rotated(followed.path, None if current is None else current.id)
        at = next((at for at, file in enumerate(rotated) if _holds(file, position)), len(rotated))
        for file in rotated[:at]:
            file.close()
        for file in rotated[at:]:
            self._append(followed, file, position.offset if file.id == position.file else 0)
        for tail in followed.tails:
            tail.rotated_at = self._pipeline.monotonic()
        if current is not None:
            self._append(followed, current, 0)
        if at < len(rotated):
            return
        reason = Reason.ROTATED_AWAY
        if identity == position.file:
            reason = Reason.TRUNCATED_FILE
        start = current.mark(0) if current is not None else position._replace(offset=0)
        followed.last = start
        await followed.feed.gap(reason, None, start)

    async def _add(self, followed: _Followed, position: FilePosition | None) -> _Tail | None:
        """The file that the path names; None when there is none, or not that of the position."""
        file = await self._opened(followed.path)
        if file is None:
            return None
        if position is not None and not _holds(file, position):
            file.close()
            return None
        return self._append(followed, file, position.offset if position is not None else 0)

    def _append(self, followed: _Followed, file: LogFile, offset: int) -> _Tail:
        tail = _Tail(file, offset, self._max_line_bytes)
        followed.tails.append(tail)
        return tail

    async def _opened(self, path: Path) -> LogFile | None:
        try:
            return await asyncio.to_thread(LogFile, path)
        except OSError as exc:
            log.debug("log file not opened", path=str(path), error=str(exc))
            return None

    async def _rotated(self, path: Path, current: FileId | None) -> list[LogFile]:
        """What the path named before the current file, which was opened before: no rotation comes in between unseen."""
        try:
            files = await asyncio.to_thread(logfiles.open_rotated, path)
        except OSError as exc:
            log.warning("rotated log files not read", path=str(path), error=str(exc), next_step="let plexd read them")
            return []
        identities = [file.id for file in files]
        end = identities.index(current) if current in identities else len(files)
        for file in files[end:]:
            file.close()
        return files[:end]

    async def _notice_rotation(self, followed: _Followed) -> None:
        """The path names another file, or none."""
        identity = await asyncio.to_thread(logfiles.file_id, followed.path)
        newest = followed.tails[-1] if followed.tails else None
        if newest is not None:
            if identity == newest.file.id:
                return
            if newest.rotated_at is None:
                newest.rotated_at = self._pipeline.monotonic()
        current = await self._opened(followed.path) if identity is not None else None
        if current is None:
            return
        try:
            if newest is not None:
                await self._queue_rotated(followed, newest, current.id)
        except BaseException:
            current.close()
            raise
        self._begin_again(followed, current)

    async def _queue_rotated(self, followed: _Followed, newest: _Tail, current: FileId) -> None:
        """What the path named after the newest file of it that is known, and before the current one."""
        rotated = await self._rotated(followed.path, current)
        identities = [file.id for file in rotated]
        is_ordered = newest.file.id in identities
        start = identities.index(newest.file.id) + 1 if is_ordered else 0
        known = {tail.file.id for tail in followed.tails} | self._finished.keys()
        for at, file in enumerate(rotated):
            # what was read last has another name by now, or none: times have to tell what came after it
            is_earlier = at < start if is_ordered else file.modified_ns() < newest.file.modified_ns()
            if is_earlier or file.id in known:
                file.close()
            else:
                self._append(followed, file, 0).rotated_at = newest.rotated_at

    def _begin_again(self, followed: _Followed, current: LogFile) -> None:
        """With the file that the path names now, unless it is one that came here from another path."""
        if self._is_read(current.id):
            current.close()
            return
        finished = self._finished.pop(current.id, None)
        self._append(followed, current, finished.offset if finished is not None else 0)

    async def _read(self, followed: _Followed) -> bool:
        """Up to 1 MiB of a path; whether there is more."""
        left = CYCLE_BYTES
        while followed.tails:
            tail = followed.tails[0]
            try:
                left = await self._read_tail(followed, tail, left)
            except BaseException:
                tail.rewind()
                raise
            if left <= 0:
                return True
            if not self._is_finished(tail):
                return False
            await self._take_unfinished(followed, tail)
            self._finish(followed, tail)
        if followed.committed == followed.last:
            self._forget(followed)
        return False

    async def _read_tail(self, followed: _Followed, tail: _Tail, left: int) -> int:
        """To the end of the file, or until `left` bytes are used up; what is left of them."""
        if tail.file.size() < tail.seen or not tail.file.is_same_content():
            await self._start_over(followed, tail)
        while left > 0:
            chunk = await asyncio.to_thread(tail.file.read, tail.seen, CHUNK_BYTES)
            if not chunk:
                break
            if not tail.seen:
                tail.file.know_by(chunk)  # it may have been empty a moment ago
            if followed.learn_fingerprint():
                await self._cursors.save()  # before anything is taken of what the position on disk does not tell
            left -= len(chunk)
            tail.seen += len(chunk)
            tail.grown_at = self._pipeline.monotonic()
            for line, length in tail.lines.feed(chunk):
                await self._take(followed, tail, line, length, 1)
        unfinished, length = tail.lines.unfinished
        if unfinished and self._pipeline.monotonic() - tail.grown_at >= UNFINISHED_SECONDS:
            tail.lines.clear()
            await self._take(followed, tail, unfinished, length, 0)
        return left

    async def _start_over(self, followed: _Followed, tail: _Tail) -> None:
        """The file was emptied under its name: what was written last before that may be gone."""
        tail.offset = 0
        tail.rewind()
        tail.file.renew()
        log.info("log file truncated", path=str(followed.path))
        await followed.feed.gap(Reason.TRUNCATED_FILE, None, tail.position())

    def _is_finished(self, tail: _Tail) -> bool:
        return tail.rotated_at is not None and self._pipeline.monotonic() - tail.rotated_at >= KEPT_SECONDS

    async def _take_unfinished(self, followed: _Followed, tail: _Tail) -> None:
        unfinished, length = tail.lines.unfinished
        if unfinished:
            tail.lines.clear()
            await self._take(followed, tail, unfinished, length, 0)

    def _finish(self, followed: _Followed, tail: _Tail) -> None:
        followed.tails.popleft()
        tail.file.close()
        followed.last = self._finished[tail.file.id] = tail.position()
        while len(self._finished) > logfiles.MAX_FILES:
            del self._finished[next(iter(self._finished))]

    def _forget(self, followed: _Followed) -> None:
        """The file is gone, and its last line is delivered."""
        del self._followed[followed.path]
        self._pipeline.forget_feed(str(followed.path))
        followed.close()
        self._cursors.touch()

    async def _take(self, followed: _Followed, tail: _Tail, line: bytes, length: int, newline: int) -> None:
        feed = followed.feed
        position = tail.file.mark(tail.offset + length + newline)
        text = line.removesuffix(b"\r").decode("utf-8", "replace")
        severity, text = split_priority(text)
        priority = INFO if severity is None else severity
        if not text.strip("\0 \t\r\v\f"):
            feed.skip_empty(position)
        elif not self._wanted.wants_file(feed.name, priority):
            feed.skip_filtered(position)
        else:
            now = self._pipeline.now()
            stamp = parse_stamp(text, now)
            body, cut = followed.form.write(int(now * 1e6) if stamp is None else stamp, "", text, NAMES[priority])
            while not feed.offer(body, position):
                await feed.room(len(body))
            if cut:
                feed.note_truncated()
        tail.offset = position.offset


def _holds(file: LogFile, position: FilePosition) -> bool:
    return file.id == position.file and file.matches(position.fingerprint) and file.size() >= position.offset


def _positions(stored: Any) -> dict[Path, FilePosition]:
    found = {}
    for path, value in stored.items() if isinstance(stored, dict) else ():
        try:
            found[Path(path)] = FilePosition.parse(value)
        except (TypeError, KeyError, ValueError):
            log.warning("position not usable", path=str(path))
    return found
