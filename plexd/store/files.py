"""Files written whole or not at all, and the data directory they live in."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from plexd.errors import LocalStateError
from plexd.log import get_logger

log = get_logger("store")

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700
JOURNAL = "journal.json"
# beginnings, in the top
OWN_NAMES = ("identity.json", "private_key", "node_secret_key", "signing_", JOURNAL, "plexd.lock")
STATE_DIRECTORIES = ("state", "state/data", "state/report")
_TEMPORARY = ".tmp-"


def write_whole(path: Path, data: bytes) -> None:
    """Replace `path` by `data` with mode 0600: temporary file, fsync, rename, fsync of the directory.

    After a crash at any point the file holds the old or the new content. OSError leaves the old one in force.
    """
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(exc, OSError):
            exc.filename = str(path)  # the file the reader knows, not the temporary one
        raise
    sync_directory(path.parent)


def write_together(directory: Path, contents: Mapping[str, bytes | None]) -> None:
    """Replace several files of `directory` as one, in the order given; None removes a file. The contents are UTF-8.

    After a crash at any point it is all or nothing, once the data directory has been opened again. OSError may leave
    it begun: `finish_writing` goes on with it.
    """
    journal = {name: None if content is None else content.decode() for name, content in contents.items()}
    write_whole(directory / JOURNAL, json.dumps(journal).encode())
    finish_writing(directory)


def finish_writing(directory: Path) -> None:
    """Do what is left of the last `write_together`, if anything."""
    raw = read_optional(directory / JOURNAL)
    if raw is None:
        return
    try:
        contents = {str(name): content for name, content in json.loads(raw).items()}
    except (ValueError, AttributeError, RecursionError) as exc:
        move_aside(directory / JOURNAL, repr(exc))
        return
    for name, content in contents.items():
        if content is None:
            remove_durably(directory / name)
        else:
            write_whole(directory / name, content.encode())
    remove_durably(directory / JOURNAL)


def rename_durably(source: Path, target: Path) -> None:
    """Rename within one directory and make it last."""
    source.rename(target)
    sync_directory(target.parent)


def remove_durably(path: Path) -> None:
    """Remove a file; removing what is gone succeeds."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_optional(path: Path) -> bytes | None:
    """The content, or None when there is no such file.

    Any other failure is a LocalStateError: a disk that does not answer must never look like a node without identity.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise LocalStateError(
            f"cannot read {path}: {exc.strerror}; repair the file or its permissions, then start plexd again"
        ) from exc


def move_aside(path: Path, reason: str) -> Path:
    """Rename a file that cannot be used to `<name>.corrupt-<unix time>`, so that nothing is lost and start goes on."""
    target = path.with_name(f"{path.name}.corrupt-{int(time.time())}")
    rename_durably(path, target)
    log.error("unusable file moved aside", path=str(path), kept_as=str(target), reason=reason)
    return target


class DirectoryLocked(LocalStateError):
    """Another plexd works in this data directory."""


class DataDirectory:
    """The data directory, made, checked and locked. One daemon holds it at a time; `close` gives it back."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Without `create` it must exist.

        Raises LocalStateError when the directory cannot be used, DirectoryLocked when another plexd works in it.
        """
        self.path = path
        try:
            if create:
                path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
                for directory in STATE_DIRECTORIES:
                    (path / directory).mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            self._lock = os.open(path / "plexd.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        except OSError as exc:
            raise LocalStateError(
                f"cannot use data directory {path}: {exc.strerror}; it must be a writable directory (set data_dir)"
            ) from exc
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(self._lock)
            if exc.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise LocalStateError(f"cannot lock {path / 'plexd.lock'}: {exc.strerror}") from exc
            raise DirectoryLocked(
                f"plexd is already running with data directory {path}: stop it first, or use another --data-dir"
            ) from None
        try:
            self._repair()
            finish_writing(path)
        except OSError as exc:
            self.close()
            raise LocalStateError(
                f"cannot put {exc.filename} in order: {exc.strerror}; check its owner and the file system"
            ) from exc
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._lock)

    def _repair(self) -> None:
        """Remove what a crash left, narrow modes that are too wide, refuse files of a foreign owner."""
        trusted = {0, os.geteuid()}
        for entry in self._own_entries():
            status = entry.lstat()
            if status.st_uid not in trusted:
                raise LocalStateError(
                    f"{entry} belongs to user id {status.st_uid}: chown it to root, or to the user plexd runs as"
                )
            if entry.name.startswith(_TEMPORARY):
                entry.unlink()
                continue
            wanted = DIRECTORY_MODE if stat.S_ISDIR(status.st_mode) else FILE_MODE
            if stat.S_IMODE(status.st_mode) & ~wanted and not stat.S_ISLNK(status.st_mode):
                log.warning("file mode repaired", path=str(entry), was=f"{stat.S_IMODE(status.st_mode):04o}")
                entry.chmod(wanted)

    def _own_entries(self) -> Iterator[Path]:
        """What plexd put here: a data directory that was given by mistake keeps its other files as they are."""
        entries = [entry for entry in self.path.iterdir() if entry.name != "state"]
        files = [entry for entry in entries if entry.name.startswith((*OWN_NAMES, _TEMPORARY))]
        if len(files) == len(entries) or any(file.name.startswith("identity.json") for file in files):
            yield self.path
        yield from files
        for name in STATE_DIRECTORIES:
            directory = self.path / name
            if directory.is_dir():
                yield directory
                yield from (file for file in directory.iterdir() if not file.is_dir())
