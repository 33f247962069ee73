"""The desired snapshot: what the control plane last told us, as one immutable value.

A state pull replaces it, a verified event is folded into it (`fold.py`); `target.py` turns it into what the kernel
should hold. Peers stand here as received, valid in themselves; which prefixes win is decided over all of them there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import dropwhile
from types import MappingProxyType
from typing import Any, NamedTuple

from plexd.mesh.address import Prefix
from plexd.mesh.keys import PresharedKey, PublicKey


class EndpointSource(StrEnum):
    """Who named an endpoint (docs/contract/mesh.md §4.4)."""

    PEER = "S"  # a Peer object: registration, state, peer_added, peer_key_rotated
    EVENT = "E"  # peer_endpoint_changed
    REPORT = "R"  # the answer to our endpoint report


class Candidates(NamedTuple):
    """The last value of each source that ever named an endpoint, the one that changed last at the end."""

    offers: tuple[tuple[EndpointSource, str], ...] = ()

    @property
    def current(self) -> str:
        """The endpoint text to use; empty while no source names one."""
        return next(self.newest_first(), "")

    def newest_first(self) -> Iterator[str]:
        """Every endpoint text that a source names; two sources may name the same."""
        return (value for _, value in reversed(self.offers) if value)

    def offer(self, source: EndpointSource, value: str) -> Candidates:
        """A source repeating itself changes nothing, so an old value cannot undo a newer one of another source."""
        held = ""
        for offered, text in self.offers:
            if offered is source:
                held = text
        if held == value:
            return self
        return Candidates((*(o for o in self.offers if o[0] is not source), (source, value)))

    def is_news_since(self, was: Candidates) -> bool:
        """Whether the endpoint to use is another one than `was`, and was named since.

        What is left once a source takes back its own was named before: that clears no endpoint that works
        (docs/contract/mesh.md §4.4).
        """
        # an offer that changes goes to the end, so those that did not come first, in the order they had
        before = iter(was.offers)
        changed = dropwhile(lambda offer: offer in before, self.offers)
        return self.current != was.current and any(value for _, value in changed)


NO_CANDIDATES = Candidates()


class Peer(NamedTuple):
    """A peer as the control plane wants it; keys and addresses are parsed, `allowed_ips` include the mesh address."""

    id: str
    public_key: PublicKey
    mesh_ip: bytes
    endpoint: str
    allowed_ips: tuple[Prefix, ...]
    psk: PresharedKey  # NO_PRESHARED_KEY: none


class Rejection(NamedTuple):
    """A peer that was left out, and why; the reason never holds key material."""

    peer_id: str
    reason: str


class PolicyRule(NamedTuple):
    src: str
    dst: str
    port: int
    protocol: str
    action: str


class Policy(NamedTuple):
    id: str
    rules: tuple[PolicyRule, ...]


class SigningKeys(NamedTuple):
    """Ed25519 keys that verify events, 32 bytes each; `previous` counts until `previous_until` (Unix seconds)."""

    current: bytes
    previous: bytes | None = None
    previous_until: float = 0.0


class DataEntry(NamedTuple):
    """`payload` is the JSON text as received, numbers and member order untouched; `updated_at` is RFC 3339 text."""

    key: str
    content_type: str
    payload: str
    version: int
    updated_at: str


def _no_entries() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Desired:
    """One node's desired snapshot. Mappings keep the control plane's order and are never changed in place."""

    peers: Mapping[str, Peer] = field(default_factory=_no_entries)
    rejected: tuple[Rejection, ...] = ()
    candidates: Mapping[str, Candidates] = field(default_factory=_no_entries)
    policies: tuple[Policy, ...] = ()
    signing_keys: SigningKeys | None = None
    metadata: Mapping[str, str] = field(default_factory=_no_entries)
    data: Mapping[str, DataEntry] = field(default_factory=_no_entries)
    secret_refs: Mapping[str, int] = field(default_factory=_no_entries)
    configs: Mapping[str, str] = field(default_factory=_no_entries, repr=False)  # `*_config` as JSON, keys in clear


@dataclass(frozen=True, slots=True)
class FullState:
    """A state pull, parsed. None: the control plane made no statement about this category, it stays as it is."""

    peers: tuple[Peer, ...] | None
    rejected: tuple[Rejection, ...]
    policies: tuple[Policy, ...] | None
    signing_keys: SigningKeys | None
    metadata: Mapping[str, str]
    data: Mapping[str, DataEntry]
    secret_refs: Mapping[str, int]
    configs: Mapping[str, str] = field(repr=False)  # absent ones are missing; withdrawn if they were present before
