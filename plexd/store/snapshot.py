"""The desired snapshot on disk, so that the mesh comes up without a control plane; and the drift not yet reported.

Peers, candidates, policies and bridge configuration are one file; metadata, data and secret index have files of
their own, one for each data entry. PSKs are in here: the files are for their owner only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from plexd.errors import LocalStateError
from plexd.log import get_logger
from plexd.mesh.address import Prefix, format_ip, parse_ip
from plexd.mesh.desired import (
    Candidates,
    DataEntry,
    Desired,
    EndpointSource,
    Peer,
    Policy,
    PolicyRule,
    Rejection,
)
from plexd.mesh.drift import Correction
from plexd.mesh.keys import NO_PRESHARED_KEY, PresharedKey, PublicKey
from plexd.mesh.sharing import Shared
from plexd.store.entries import encode_entry, file_of, load_entries
from plexd.store.files import DataDirectory, move_aside, read_optional, remove_durably, write_whole

log = get_logger("store")

FORMAT_VERSION = 1
MAX_UNSENT_CORRECTIONS = 500
PIECE_ITEMS = 250  # half a millisecond of encoding
PAUSE_SECONDS = 0.001

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CachedSnapshot:
    """`fetched_at`: when the last state pull succeeded, Unix seconds, 0.0 for never."""

    desired: Desired
    fetched_at: float


class SnapshotStore:
    """Reads and writes the snapshot; one call at a time."""

    def __init__(self, directory: DataDirectory) -> None:
        self._state = directory.path / "state"
        self._data = self._state / "data"
        self._saved: Desired | None = None

    def load(self, node_id: str) -> CachedSnapshot:
        """The cached snapshot of this node; empty when there is none, it is another node's, or it is unreadable."""
        desired, fetched_at = Desired(), 0.0
        document = self._read(self._state / "desired.json")
        if document is not None:
            try:
                _check_version(document)
                if document["node_id"] != node_id:
                    log.info("cached snapshot of another node ignored")
                    return CachedSnapshot(Desired(), 0.0)
                desired, fetched_at = _decode_desired(document), float(document["fetched_at"])
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                move_aside(self._state / "desired.json", repr(exc))
        desired = replace(
            desired,
            metadata=MappingProxyType(self._load_metadata()),
            data=MappingProxyType({entry.key: entry for entry in load_entries(self._data)}),
            secret_refs=MappingProxyType(self._load_secret_refs()),
        )
        self._saved = desired
        return CachedSnapshot(desired, fetched_at)

    def save(self, node_id: str, desired: Desired, fetched_at: float) -> None:
        """Write what differs from the last save. OSError leaves the files that could not be written as they were."""
        was = self._saved
        self._saved = None  # after a failure half-way nothing is taken for written
        write_whole(self._state / "desired.json", _unhurried(_encode_desired(node_id, desired, fetched_at)))
        self._save_entries(was, desired)
        self._saved = desired

    def save_entries(self, desired: Desired) -> None:
        """Write what differs from the last save in metadata, data and secret index. OSError as with `save`."""
        was, self._saved = self._saved, None
        self._save_entries(was, desired)
        if was is not None:
            self._saved = replace(was, metadata=desired.metadata, data=desired.data, secret_refs=desired.secret_refs)

    def _save_entries(self, was: Desired | None, desired: Desired) -> None:
        if was is None or was.metadata != desired.metadata:
            write_whole(self._state / "metadata.json", _dump(dict(desired.metadata)))
        if was is None or was.secret_refs != desired.secret_refs:
            refs = [{"key": key, "version": version} for key, version in desired.secret_refs.items()]
            write_whole(self._state / "secrets.json", _dump(refs))
        if was is None or was.data != desired.data:
            self._save_data({} if was is None else was.data, desired.data)

    def contents(self, node_id: str, desired: Desired, fetched_at: float) -> dict[str, bytes | None]:
        """What `save` would leave, by path within the data directory, for who writes it with other things as one."""
        self._saved = None
        refs = [{"key": key, "version": version} for key, version in desired.secret_refs.items()]
        entries = {file_of(self._data, key): encode_entry(entry) for key, entry in desired.data.items()}
        stale = set(self._data.glob("*.json")) - entries.keys()
        contents: dict[Path, bytes | None] = {
            self._state / "desired.json": _unhurried(_encode_desired(node_id, desired, fetched_at)),
            self._state / "metadata.json": _dump(dict(desired.metadata)),
            self._state / "secrets.json": _dump(refs),
            **entries,
            **dict.fromkeys(stale),
        }
        return {str(path.relative_to(self._state.parent)): content for path, content in contents.items()}

    def _save_data(self, old: Mapping[str, DataEntry], new: Mapping[str, DataEntry]) -> None:
        for key, entry in new.items():
            if old.get(key) != entry:
                write_whole(file_of(self._data, key), encode_entry(entry))
        wanted = {file_of(self._data, key) for key in new}
        # by what lies there: entries of another node, or of a save that failed half-way, are in no memory
        for path in self._data.glob("*.json"):
            if path not in wanted:
                remove_durably(path)

    def load_unsent_corrections(self) -> tuple[Correction, ...]:
        document = self._read(self._state / "drift.json")
        if document is None:
            return ()
        try:
            _check_version(document)
            return tuple(Correction(str(c["type"]), str(c["detail"])) for c in document["corrections"])
        except (ValueError, KeyError, TypeError) as exc:
            move_aside(self._state / "drift.json", repr(exc))
            return ()

    def save_unsent_corrections(self, corrections: Iterable[Correction]) -> tuple[Correction, ...]:
        """Keep the newest 500; none removes the file. Returns what was kept."""
        kept = tuple(corrections)[-MAX_UNSENT_CORRECTIONS:]
        if kept:
            entries = [{"type": c.type, "detail": c.detail} for c in kept]
            write_whole(self._state / "drift.json", _dump({"version": FORMAT_VERSION, "corrections": entries}))
        else:
            remove_durably(self._state / "drift.json")
        return kept

    def _read(self, path: Path) -> Any:
        try:
            raw = read_optional(path)
            return None if raw is None else json.loads(raw)
        except (LocalStateError, ValueError, RecursionError) as exc:  # a cache is no reason not to start
            move_aside(path, str(exc))
            return None

    def _load_metadata(self) -> dict[str, str]:
        document = self._read(self._state / "metadata.json")
        if document is None:
            return {}
        if not isinstance(document, dict):
            move_aside(self._state / "metadata.json", "not an object")
            return {}
        return {str(key): str(value) for key, value in document.items()}

    def _load_secret_refs(self) -> dict[str, int]:
        document = self._read(self._state / "secrets.json")
        if document is None:
            return {}
        try:
            return {str(ref["key"]): int(ref["version"]) for ref in document}
        except (KeyError, TypeError, ValueError) as exc:
            move_aside(self._state / "secrets.json", repr(exc))
            return {}


def _check_version(document: dict[str, Any]) -> None:
    if document["version"] != FORMAT_VERSION:
        raise ValueError(f"version {document['version']} is not known")


def _dump(document: object) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _unhurried(pieces: Iterable[bytes]) -> bytes:
    """All of them in one, with the interpreter left to others after each.

    A thread that computes gives it up every 5 ms, and an event waits for it several times.
    """
    made = []
    for piece in pieces:
        made.append(piece)
        time.sleep(PAUSE_SECONDS)
    return b"".join(made)


def _encode_desired(node_id: str, desired: Desired, fetched_at: float) -> Iterator[bytes]:
    """One document, in pieces of well under a millisecond."""
    head = {
        "version": FORMAT_VERSION,
        "node_id": node_id,
        "fetched_at": fetched_at,
        "rejected": [rejection._asdict() for rejection in desired.rejected],
        "configs": dict(desired.configs),
    }
    yield _dump(head)[:-1]
    yield from _in_pieces(b',"peers":[', map(_peer_document, desired.peers.values()), list, b"]")
    candidates = ((peer_id, candidates.offers) for peer_id, candidates in desired.candidates.items())
    yield from _in_pieces(b',"candidates":{', candidates, dict, b"}")
    yield from _in_pieces(b',"policies":[', map(_policy_document, desired.policies), list, b"]}")


def _in_pieces(
    opening: bytes, items: Iterator[T], gather: Callable[[Iterable[T]], object], closing: bytes
) -> Iterator[bytes]:
    while some := list(islice(items, PIECE_ITEMS)):
        yield opening + _dump(gather(some))[1:-1]
        opening = b","
    yield closing if opening == b"," else opening + closing


def _peer_document(peer: Peer) -> dict[str, object]:
    return {
        "id": peer.id,
        "public_key": str(peer.public_key),
        "mesh_ip": format_ip(peer.mesh_ip) if peer.mesh_ip else "",  # reachable by its allowed IPs only
        "endpoint": peer.endpoint,
        "allowed_ips": [str(prefix) for prefix in peer.allowed_ips],
        "psk": peer.psk.reveal() if peer.psk != NO_PRESHARED_KEY else "",
    }


def _policy_document(policy: Policy) -> dict[str, object]:
    return {"id": policy.id, "rules": [rule._asdict() for rule in policy.rules]}


def _decode_desired(document: dict[str, Any]) -> Desired:
    peers = (
        Peer(
            entry["id"],
            PublicKey.parse(entry["public_key"]),
            parse_ip(entry["mesh_ip"]) if entry["mesh_ip"] else b"",
            entry["endpoint"],
            tuple(map(Prefix.parse, entry["allowed_ips"])),
            PresharedKey.parse(entry["psk"]) if entry["psk"] else NO_PRESHARED_KEY,
        )
        for entry in document["peers"]
    )
    return Desired(
        peers=Shared({peer.id: peer for peer in peers}),
        rejected=tuple(Rejection(**entry) for entry in document["rejected"]),
        candidates=Shared(
            {
                peer_id: Candidates(tuple((EndpointSource(source), str(value)) for source, value in offers))
                for peer_id, offers in document["candidates"].items()
            }
        ),
        policies=tuple(
            Policy(entry["id"], tuple(PolicyRule(**rule) for rule in entry["rules"])) for entry in document["policies"]
        ),
        configs=MappingProxyType({str(k): str(v) for k, v in document["configs"].items()}),
    )
