"""Who the node is, on disk. `identity.json` is the commit mark: without it the node is not registered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from plexd.errors import LocalStateError
from plexd.log import get_logger
from plexd.mesh.address import format_ip, parse_ip
from plexd.mesh.desired import SigningKeys
from plexd.mesh.keys import PrivateKey, PublicKey, decode_key
from plexd.store.files import (
    DataDirectory,
    finish_writing,
    move_aside,
    read_optional,
    remove_durably,
    rename_durably,
    write_together,
    write_whole,
)
from plexd.wire.times import format_time, parse_time

log = get_logger("store")

FORMAT_VERSION = 1  # implied by a file that names none
IDENTITY = "identity.json"
PRIVATE_KEY = "private_key"
PENDING_KEY = "private_key.pending"
NODE_KEY = "node_secret_key"
SIGNING_KEY = "signing_public_key"
SIGNING_KEYS = "signing_keys.json"


@dataclass(frozen=True, slots=True)
class Identity:
    """`private_key` is None when its file is lost or damaged: the node keeps its place and needs a new key pair."""

    node_id: str
    mesh_ip: bytes
    node_key: SecretStr
    private_key: PrivateKey | None


class IdentityDamaged(Exception):
    """The identity on disk was unusable and has been moved aside; the text says what was wrong."""


class IdentityStore:
    """Reads and writes the identity files of a data directory."""

    def __init__(self, directory: DataDirectory) -> None:
        self._path = directory.path

    def load(self) -> Identity | None:
        """None: not registered. Raises IdentityDamaged after moving the files aside, LocalStateError on I/O errors."""
        try:
            return self._read()
        except IdentityDamaged as exc:
            self._move_aside(str(exc))
            raise

    def look_again(self) -> Identity | None:
        """What is on disk by now, while the daemon runs. Raises the same as `load`, and OSError, and moves nothing."""
        finish_writing(self._path)
        return self._read()

    def _read(self) -> Identity | None:
        raw = read_optional(self._path / IDENTITY)
        if raw is None:
            return None
        node_key = (read_optional(self._path / NODE_KEY) or b"").decode("utf-8", "replace").strip()
        try:
            document = json.loads(raw)
            if document.get("version", FORMAT_VERSION) != FORMAT_VERSION:
                raise LocalStateError(
                    f"{self._path / IDENTITY} was written by a newer plexd (version {document['version']}): "
                    f"install that one again"
                )
            node_id, mesh_ip = document["node_id"], parse_ip(document["mesh_ip"].partition("/")[0])
            if not isinstance(node_id, str) or not node_id:
                raise ValueError("no node_id")
            if not node_key:
                raise ValueError(f"{NODE_KEY} is missing or empty")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise IdentityDamaged(f"identity in {self._path} is damaged: {exc}") from exc
        return Identity(node_id, mesh_ip, SecretStr(node_key), self._read_private_key(PRIVATE_KEY))

    def load_signing_keys(self) -> SigningKeys | None:
        """`signing_keys.json`, else `signing_public_key`, else `identity.json`; None when none of them is good."""
        raw = read_optional(self._path / SIGNING_KEYS)
        if raw is not None:
            try:
                document = json.loads(raw)
                until = document.get("transition_expires")
                return SigningKeys(
                    decode_key(document["current"]),
                    decode_key(document["previous"]) if document.get("previous") else None,
                    parse_time(until) or 0.0 if until else 0.0,
                )
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
                move_aside(self._path / SIGNING_KEYS, str(exc))
        texts = [(read_optional(self._path / SIGNING_KEY) or b"").decode("ascii", "replace").strip()]
        identity = read_optional(self._path / IDENTITY)
        if identity is not None:
            texts.append(str(json.loads(identity).get("signing_public_key", "")))
        for text in filter(None, texts):
            try:
                return SigningKeys(decode_key(text))
            except ValueError:
                log.warning("stored signing key ignored", reason="not a key")
        return None

    def pending_key(self) -> PrivateKey | None:
        """The key pair of a registration or rotation in progress."""
        return self._read_private_key(PENDING_KEY)

    def make_pending_key(self) -> PrivateKey:
        """The pending key, made and stored if there is none: every retry, also after a crash, offers the same one."""
        key = self.pending_key()
        if key is None:
            key = PrivateKey.generate()
            write_whole(self._path / PENDING_KEY, key.reveal().encode())
        return key

    def make_registration_key(self) -> PrivateKey:
        """The pending key for a registration.

        A start that died between the rename of the key and the commit mark left the key as `private_key`, and the
        control plane may know it already: it is taken up again.
        """
        if self.pending_key() is None and not (self._path / IDENTITY).exists():
            orphan = self._read_private_key(PRIVATE_KEY)
            if orphan is not None:
                write_whole(self._path / PENDING_KEY, orphan.reveal().encode())
        return self.make_pending_key()

    def drop_pending_key(self) -> None:
        remove_durably(self._path / PENDING_KEY)

    def commit_pending_key(self) -> None:
        """The pending key becomes the private key."""
        rename_durably(self._path / PENDING_KEY, self._path / PRIVATE_KEY)

    def commit_registration(self, identity: Identity, signing_keys: SigningKeys | None) -> None:
        """Everything but the commit mark; `commit_mark` follows once the rest of the answer is on disk too."""
        self.commit_pending_key()
        write_whole(self._path / NODE_KEY, identity.node_key.get_secret_value().encode())
        if signing_keys is not None:
            self.save_signing_keys(signing_keys)
        else:
            remove_durably(self._path / SIGNING_KEY)
            remove_durably(self._path / SIGNING_KEYS)

    def commit_mark(self, identity: Identity, signing_keys: SigningKeys | None) -> None:
        write_whole(self._path / IDENTITY, _encode_mark(identity, signing_keys))

    def replace(self, identity: Identity, signing_keys: SigningKeys | None, also: Mapping[str, bytes | None]) -> None:
        """Put another identity in the place of this one, and `also` other files, as one: a crash leaves either.

        OSError may leave it begun; `look_again` then finishes it.
        """
        assert identity.private_key is not None  # noqa: S101 - just registered with it
        keys = _encode_signing_keys(signing_keys) if signing_keys is not None else (None, None)
        contents = {
            PRIVATE_KEY: identity.private_key.reveal().encode(),
            NODE_KEY: identity.node_key.get_secret_value().encode(),
            **dict(zip((SIGNING_KEYS, SIGNING_KEY), keys, strict=True)),
            **also,
            IDENTITY: _encode_mark(identity, signing_keys),
            PENDING_KEY: None,
        }
        write_together(self._path, contents)

    def save_signing_keys(self, keys: SigningKeys) -> None:
        document, mirror = _encode_signing_keys(keys)
        write_whole(self._path / SIGNING_KEYS, document)
        write_whole(self._path / SIGNING_KEY, mirror)

    def retire(self, suffix: str) -> None:
        """Take the identity out of use: `identity.json` keeps a copy under `suffix`, the keys are deleted."""
        rename_durably(self._path / IDENTITY, self._path / f"{IDENTITY}{suffix}")
        for name in (PRIVATE_KEY, PENDING_KEY, NODE_KEY):
            remove_durably(self._path / name)

    def replace_aside(self, suffix: str) -> None:
        """Move the identity to `<name><suffix>`, the commit mark first; a pending key stays for the next try."""
        for name in (IDENTITY, PRIVATE_KEY, NODE_KEY, SIGNING_KEY, SIGNING_KEYS):
            if (self._path / name).exists():
                rename_durably(self._path / name, self._path / f"{name}{suffix}")

    def restore(self, suffix: str) -> None:
        """Take `replace_aside` back, the commit mark last."""
        for name in (SIGNING_KEYS, SIGNING_KEY, NODE_KEY, PRIVATE_KEY, IDENTITY):
            if (self._path / f"{name}{suffix}").exists():
                rename_durably(self._path / f"{name}{suffix}", self._path / name)

    def _read_private_key(self, name: str) -> PrivateKey | None:
        raw = read_optional(self._path / name)
        if raw is None:
            return None
        try:
            return PrivateKey.parse(raw.decode("ascii").strip())
        except (UnicodeDecodeError, ValueError):
            log.error("stored private key ignored", file=name, reason="not 32 bytes of base64")
            return None

    def _move_aside(self, reason: str) -> None:
        for name in (IDENTITY, PRIVATE_KEY, PENDING_KEY, NODE_KEY, SIGNING_KEY, SIGNING_KEYS):
            if (self._path / name).exists():
                move_aside(self._path / name, reason)


def _encode_mark(identity: Identity, signing_keys: SigningKeys | None) -> bytes:
    document = {
        "node_id": identity.node_id,
        "mesh_ip": format_ip(identity.mesh_ip),
        "signing_public_key": str(PublicKey(signing_keys.current)) if signing_keys is not None else "",
    }
    return json.dumps(document).encode()


def _encode_signing_keys(keys: SigningKeys) -> tuple[bytes, bytes]:
    """The file of the whole set, and its mirror with the current key alone."""
    document: dict[str, str] = {"current": str(PublicKey(keys.current))}
    if keys.previous is not None:
        document["previous"] = str(PublicKey(keys.previous))
        document["transition_expires"] = format_time(keys.previous_until)
    return json.dumps(document).encode(), document["current"].encode()


def data_dir_is_purgeable(path: Path) -> str | None:
    """Why `deregister --purge` must not delete the content of this directory; None when it may."""
    if not path.is_absolute():
        return "it is not an absolute path"
    if path.is_symlink():
        return "it is a symbolic link"
    if len(path.parts) < 3:  # the root and two components
        return "it is too close to the root"
    if not any(path.glob("identity.json*")) and not (path / "state" / "desired.json").exists():
        return "it does not look like a plexd data directory"
    return None


def refuse_lost_identity(reason: str) -> LocalStateError:
    return LocalStateError(
        f"{reason}; restore the data directory, or provide a bootstrap token to register the node anew"
    )
