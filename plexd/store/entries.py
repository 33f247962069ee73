"""Entries of data and reports as files, one each: names that lead nowhere else, payloads that stay as they were."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plexd.errors import LocalStateError, WireError
from plexd.mesh.desired import DataEntry
from plexd.store.files import move_aside, read_optional
from plexd.wire.reading import load

# The payload is JSON text whose numbers must survive as they are, so it goes last and is cut out again as text.
_PAYLOAD_MARK = ',"payload":'


def file_of(directory: Path, key: str) -> Path:
    """A name that cannot lead elsewhere: unsafe bytes percent-encoded, long ones hashed."""
    name = re.sub(rb"[^A-Za-z0-9_.-]|^\.", lambda match: b"%%%02X" % match[0][0], key.encode()).decode("ascii")
    if len(name) > 200:
        name = f"h-{hashlib.sha256(key.encode()).hexdigest()}"
    return directory / f"{name}.json"


def encode_entry(entry: DataEntry) -> bytes:
    head = {
        "key": entry.key,
        "content_type": entry.content_type,
        "version": entry.version,
        "updated_at": entry.updated_at,
    }
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":"))
    return f"{text[:-1]}{_PAYLOAD_MARK}{entry.payload}}}".encode()


def load_entries(directory: Path) -> Iterator[DataEntry]:
    """All that can be used; what cannot is moved aside, for a cache is no reason not to start."""
    for path in sorted(directory.glob("*.json")):
        try:
            yield _decode_entry(read_optional(path) or b"")
        except (LocalStateError, WireError, KeyError, TypeError, ValueError) as exc:
            move_aside(path, repr(exc))


def _decode_entry(raw: bytes) -> DataEntry:
    document: Any = load(raw)
    text = raw.decode()
    # members before it are strings and numbers; json escapes every quote inside them, so the mark is unambiguous
    start = text.index(_PAYLOAD_MARK) + len(_PAYLOAD_MARK)
    return DataEntry(
        str(document["key"]),
        str(document["content_type"]),
        text[start : text.rindex("}")],
        int(document["version"]),
        str(document["updated_at"]),
    )
