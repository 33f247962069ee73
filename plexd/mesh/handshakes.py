"""Which peers begin their handshakes anew, because the first came to nothing. Pure.

WireGuard begins a handshake at once and again after five seconds, whatever waits for it. The first one is lost when the
other side does not know us yet, and two that cross cost both: who answers a handshake forgets the one it began itself.
No message makes WireGuard try sooner, but a peer that is taken out and put back is a new one, without that wait, and so
without a session: this is for peers that have none. Of each two nodes the one with the smaller key is eager, and the
other one patient, or what they try would cross again. After a few tries the peer is WireGuard's own again: it is down.

wireguard-go, but not the kernel, may come out of two that cross at the very same moment with a session in which it
sends and hears nothing, and notices after 15 seconds. A peer of it from which nothing comes back is begun anew as well.
Where that is as it should be, because all goes one way, another handshake does no harm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from plexd.mesh.changes import Change, PeerChange, PutPeer, RemovePeer
from plexd.mesh.keys import PublicKey
from plexd.mesh.observed import HANDSHAKE_FRESH_SECONDS, Device, DevicePeer
from plexd.mesh.plan import new_peer
from plexd.mesh.target import Target

SENT_BY_ITSELF = 148 + 32  # bytes: the beginning of a handshake and a keepalive, without anything to send
AT_ONCE = 200  # peers: what takes the kernel some 50 ms


class Pace(NamedTuple):
    """Of the rounds a peer is waited for, those in which is looked at it, and those in which it may be begun anew.

    With the last look the waiting ends.
    """

    looks: tuple[int, ...]
    tries: tuple[int, ...]


EAGER, PATIENT = Pace(looks=(2, 5, 15), tries=(2, 5, 15)), Pace(looks=(4, 9), tries=(9,))


class Traffic(NamedTuple):
    """Bytes with a peer since it is on the interface."""

    received: int
    sent: int


class Awaited(NamedTuple):
    """A peer that ought to shake hands, a new one, or one whose session ended with our former key, at `since` (Unix
    seconds; 0 for the new one). `then` is its traffic as we first saw that it had."""

    since: float
    pace: Pace
    rounds: int = 0
    then: Traffic | None = None


def awaited_new(done: Iterable[Change], target: Target) -> dict[str, Awaited]:
    """By peer id, those that `done` made begin a handshake as new peers.

    Without keepalive the mesh is one that stays silent until there is something to send.
    """
    own = target.settings.private_key.public()
    return {
        change.peer_id: Awaited(0.0, _pace(own, change.public_key))
        for change in done
        if isinstance(change, PutPeer) and change.is_new and change.endpoint is not None and change.keepalive
    }


def awaited_anew(public_keys: Iterable[PublicKey], target: Target, since: float) -> dict[str, Awaited]:
    """By peer id, those of these keys, whose sessions a new key of ours ended at `since`."""
    own = target.settings.private_key.public()
    renewed = frozenset(public_keys)
    return {
        peer.id: Awaited(since, _pace(own, peer.public_key))
        for peer in target.peers.values()
        if peer.public_key in renewed
    }


def _pace(own: PublicKey, other: PublicKey) -> Pace:
    return EAGER if own < other else PATIENT


def next_round(awaited: Mapping[str, Awaited]) -> tuple[dict[str, Awaited], dict[str, Awaited]]:
    """Those that are waited for beyond this round, and those that are looked at in it."""
    left: dict[str, Awaited] = {}
    due: dict[str, Awaited] = {}
    for peer_id, before in awaited.items():
        now = before._replace(rounds=before.rounds + 1)
        if now.rounds < now.pace.looks[-1]:
            left[peer_id] = now
        if now.rounds in now.pace.looks:
            due[peer_id] = now
    return left, due


def assess(
    due: Mapping[str, Awaited], target: Target, device: Device, *, may_be_deaf: bool
) -> tuple[tuple[str, ...], dict[str, Awaited]]:
    """The ids of those to begin anew in this round, and all that are still waited for after it.

    One that had lost touch before our new key is none of them.
    """
    again: list[str] = []
    left: dict[str, Awaited] = {}
    for peer_id, awaited in due.items():
        peer = target.peers.get(peer_id)
        held = device.peers.get(peer.public_key) if peer is not None else None
        if held is None or held.endpoint is None:
            continue
        if held.last_handshake == 0 or awaited.since - HANDSHAKE_FRESH_SECONDS <= held.last_handshake <= awaited.since:
            is_lost, now = True, awaited
        elif held.last_handshake > awaited.since and may_be_deaf:
            then = awaited.then or Traffic(held.rx_bytes, held.tx_bytes)
            if held.rx_bytes != then.received:
                continue  # it has been heard
            is_lost, now = held.tx_bytes - then.sent > SENT_BY_ITSELF, awaited._replace(then=then)
        else:
            continue
        if is_lost and now.rounds in now.pace.tries:
            again.append(peer_id)
            now = now._replace(then=None)
        left[peer_id] = now
    return tuple(again), left


def plan_again(peer_ids: Iterable[str], target: Target, device: Device) -> tuple[PeerChange, ...]:
    """Those peers taken out and put back where they were last heard; of very many those that have been heard."""
    held: dict[str, DevicePeer] = {peer_id: device.peers[target.peers[peer_id].public_key] for peer_id in peer_ids}
    changes: list[PeerChange] = []
    for peer_id in sorted(held, key=lambda peer_id: held[peer_id].rx_bytes == 0)[:AT_ONCE]:
        peer = target.peers[peer_id]
        changes.append(RemovePeer(peer_id, peer.public_key))
        changes.append(new_peer(peer, target.settings)._replace(endpoint=held[peer_id].endpoint))
    return tuple(changes)
