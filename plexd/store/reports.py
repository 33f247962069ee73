"""Reports of programs on this node, on disk: the entries, and what of them the control plane has not got yet.

An entry's file goes first when it is written and last when it is deleted; `load` tells from the versions what a crash
between the two left, and finishes it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from plexd.errors import LocalStateError
from plexd.log import get_logger
from plexd.mesh.desired import DataEntry
from plexd.store.entries import encode_entry, file_of, load_entries
from plexd.store.files import DataDirectory, move_aside, read_optional, remove_durably, write_whole

log = get_logger("store")


class Operation(NamedTuple):
    """What happened to a key last. The version of a delete is that of the entry it deleted."""

    op: Literal["put", "delete"]
    version: int


@dataclass(frozen=True, slots=True)
class Delivery:
    """What is due to the control plane, by key; never changed in place.

    `parked` was refused and waits for the next local write. `high_water` is the highest version ever used; `floor`
    stands in for keys that are long deleted and forgotten.
    """

    pending: Mapping[str, Operation] = field(default_factory=dict)
    parked: Mapping[str, Operation] = field(default_factory=dict)
    high_water: Mapping[str, int] = field(default_factory=dict)
    floor: int = 0

    def next_version(self, key: str) -> int:
        return self.high_water.get(key, self.floor) + 1


class ReportStore:
    """Reads and writes reports; one call at a time. Calls block for some fsyncs; OSError leaves the old in force."""

    def __init__(self, directory: DataDirectory) -> None:
        self._reports = directory.path / "state" / "report"
        self._sync = directory.path / "state" / "report_sync.json"
        self._undeleted: dict[str, int] = {}  # versions of deleted entries whose files could not be removed, by key

    def load(self) -> tuple[dict[str, DataEntry], Delivery]:
        entries = {entry.key: entry for entry in load_entries(self._reports)}
        delivery = self._load_delivery()
        high_water = dict(delivery.high_water)
        pending, parked = dict(delivery.pending), dict(delivery.parked)
        for key, entry in list(entries.items()):
            is_deleted = pending.get(key, parked.get(key)) == Operation("delete", entry.version)
            if is_deleted or self._undeleted.get(key) == entry.version:
                remove_durably(file_of(self._reports, key))
                del entries[key]
            elif entry.version > high_water.get(key, 0):  # written, and not noted any more
                high_water[key] = entry.version
                pending[key] = Operation("put", entry.version)
                parked.pop(key, None)
        self._undeleted = {}
        for operations in (pending, parked):
            for key in [k for k, operation in operations.items() if operation.op == "put" and k not in entries]:
                del operations[key]  # its file was damaged
        return entries, Delivery(pending, parked, high_water, delivery.floor)

    def put(self, entry: DataEntry, delivery: Delivery) -> None:
        write_whole(file_of(self._reports, entry.key), encode_entry(entry))
        self._undeleted.pop(entry.key, None)
        self.save(delivery)

    def delete(self, key: str, delivery: Delivery) -> None:
        self.save(delivery)
        try:
            remove_durably(file_of(self._reports, key))
        except OSError as exc:  # noted already, and for longer than the control plane takes: a later start finishes it
            self._undeleted[key] = delivery.pending[key].version
            log.error("file of a deleted report not removed", key=key, error=str(exc))

    def save(self, delivery: Delivery) -> None:
        for key in list(self._undeleted):
            with contextlib.suppress(OSError):
                remove_durably(file_of(self._reports, key))
                del self._undeleted[key]
        document = {
            "pending": {key: operation._asdict() for key, operation in delivery.pending.items()},
            "high_water": dict(delivery.high_water),
            "parked": {key: operation._asdict() for key, operation in delivery.parked.items()},
            "floor": delivery.floor,
            "undeleted": self._undeleted,
        }
        write_whole(self._sync, json.dumps(document, separators=(",", ":")).encode())

    def _load_delivery(self) -> Delivery:
        try:
            raw = read_optional(self._sync)
            if raw is None:
                return Delivery()
            document = json.loads(raw)
            self._undeleted = {str(key): int(version) for key, version in document.get("undeleted", {}).items()}
            return Delivery(
                _operations(document["pending"]),
                _operations(document["parked"]),
                {str(key): int(version) for key, version in document["high_water"].items()},
                int(document.get("floor", 0)),
            )
        except (LocalStateError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            move_aside(self._sync, repr(exc))
            return Delivery()


def _operations(document: Any) -> dict[str, Operation]:
    operations = {}
    for key, operation in document.items():
        if operation["op"] not in {"put", "delete"}:
            raise ValueError("no operation")
        operations[str(key)] = Operation(operation["op"], int(operation["version"]))
    return operations
