"""Which peers begin their handshakes anew, because the first came to nothing. Pure.

WireGuard begins a handshake at once and again after five seconds, whatever waits for it. The first one is lost when the
other side does not know us yet, and two that cross cost both: who answers a handshake forgets the one it began itself.
No message makes WireGuard try sooner, but a peer that is taken out and put back is a new one, without that wait, and so
without a session: this is for peers that have none. Of each two nodes the one with the smaller key is eager, and the
other one patient, or what they try would cross again. After a few tries the peer is WireGuard's own again: it is down.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from plexd.mesh.changes import Change, PeerChange, PutPeer, RemovePeer
from plexd.mesh.keys import PublicKey
from plexd.mesh.observed import HANDSHAKE_FRESH_SECONDS, Device, DevicePeer
from plexd.mesh.plan import new_peer
from plexd.mesh.target import Target

# of the rounds a peer is waited for, those in which it is tried again; with the last one the waiting ends
EAGER, PATIENT = (2, 5, 15), (9,)
AT_ONCE = 200  # peers: what takes the kernel some 50 ms


class Awaited(NamedTuple):
    """A peer that ought to shake hands, a new one, or one whose session ended with our former key, at `since` (Unix
    seconds; 0 for the new one)."""

    since: float
    tries: tuple[int, ...]
    rounds: int = 0


def awaited_new(done: Iterable[Change], target: Target) -> dict[str, Awaited]:
    """By peer id, those that `done` made begin a handshake as new peers.

    Without keepalive the mesh is one that stays silent until there is something to send.
    """
    own = target.settings.private_key.public()
    return {
        change.peer_id: Awaited(0.0, _tries(own, change.public_key))
        for change in done
        if isinstance(change, PutPeer) and change.is_new and change.endpoint is not None and change.keepalive
    }


def awaited_anew(public_keys: Iterable[PublicKey], target: Target, since: float) -> dict[str, Awaited]:
    """By peer id, those of these keys, whose sessions a new key of ours ended at `since`."""
    own = target.settings.private_key.public()
    renewed = frozenset(public_keys)
    return {
        peer.id: Awaited(since, _tries(own, peer.public_key))
        for peer in target.peers.values()
        if peer.public_key in renewed
    }


def _tries(own: PublicKey, other: PublicKey) -> tuple[int, ...]:
    return EAGER if own < other else PATIENT


def next_round(awaited: Mapping[str, Awaited]) -> tuple[dict[str, Awaited], dict[str, Awaited]]:
    """Those that are waited for beyond this round, and those whose turn it is."""
    left: dict[str, Awaited] = {}
    due: dict[str, Awaited] = {}
    for peer_id, (since, tries, rounds) in awaited.items():
        now = Awaited(since, tries, rounds + 1)
        if now.rounds < tries[-1]:
            left[peer_id] = now
        if now.rounds in tries:
            due[peer_id] = now
    return left, due


def unanswered(due: Mapping[str, Awaited], target: Target, device: Device) -> tuple[str, ...]:
    """The ids of those that have not shaken hands. One that had lost touch before our new key is none of them."""
    return tuple(
        peer_id
        for peer_id, (since, *_) in due.items()
        if (peer := target.peers.get(peer_id)) is not None
        and (held := device.peers.get(peer.public_key)) is not None
        and held.endpoint is not None
        and (held.last_handshake == 0 or since - HANDSHAKE_FRESH_SECONDS <= held.last_handshake <= since)
    )


def plan_again(peer_ids: Iterable[str], target: Target, device: Device) -> tuple[PeerChange, ...]:
    """Those peers taken out and put back where they were last heard; of very many those that have been heard."""
    held: dict[str, DevicePeer] = {peer_id: device.peers[target.peers[peer_id].public_key] for peer_id in peer_ids}
    changes: list[PeerChange] = []
    for peer_id in sorted(held, key=lambda peer_id: held[peer_id].rx_bytes == 0)[:AT_ONCE]:
        peer = target.peers[peer_id]
        changes.append(RemovePeer(peer_id, peer.public_key))
        changes.append(new_peer(peer, target.settings)._replace(endpoint=held[peer_id].endpoint))
    return tuple(changes)
