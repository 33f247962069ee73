"""Decides which peers begin their handshake anew, because the first handshake failed. Pure.

WireGuard begins a handshake at once and repeats it after five seconds, even if packets are waiting. The first handshake
is lost when the other node does not know this node yet. Two handshakes that cross are both lost: a node that answers a
handshake forgets its own. No message makes WireGuard try sooner, but a peer that is removed and added again starts
without the wait. It also starts without a session, so this is for peers that have none. Of two nodes the one with the
smaller key is eager and the other one patient; otherwise their tries would cross again. After a few tries the peer is
left to WireGuard: it is down.

When two handshakes cross at the same moment, wireguard-go (but not the kernel) may end up with a session in which it
sends and hears nothing, and notices that after 15 seconds. A peer of wireguard-go from which nothing comes back is
therefore begun anew too. Where traffic really goes one way only, another handshake does no harm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from plexd.mesh.changes import Change, PeerChange, PutPeer, RemovePeer
from plexd.mesh.keys import PublicKey
from plexd.mesh.observed import HANDSHAKE_FRESH_SECONDS, Device, DevicePeer
from plexd.mesh.plan import new_peer
from plexd.mesh.target import Target

SENT_BY_ITSELF = 148 + 32  # bytes: a handshake initiation and a keepalive, which WireGuard sends unasked
AT_ONCE = 200  # peers in one round: some 50 ms of work for the kernel


class Pace(NamedTuple):
    """The rounds of waiting in which a peer is looked at (`looks`) and may be begun anew (`tries`).

    The waiting ends with the last look.
    """

    looks: tuple[int, ...]
    tries: tuple[int, ...]


EAGER, PATIENT = Pace(looks=(2, 5, 15), tries=(2, 5, 15)), Pace(looks=(4, 9), tries=(9,))


class Traffic(NamedTuple):
    """Bytes exchanged with a peer since it was added to the interface."""

    received: int
    sent: int


class Awaited(NamedTuple):
    """A peer that ought to shake hands: a new peer, or a peer whose session ended with our former key.

    `since` is when the session ended, in Unix seconds, 0 for a new peer. `then` is the traffic at the first look after
    a handshake.
    """

    since: float
    pace: Pace
    rounds: int = 0
    then: Traffic | None = None


def awaited_new(done: Iterable[Change], target: Target) -> dict[str, Awaited]:
    """The peers, by id, that the changes in `done` made begin a handshake as new peers.

    Without keepalive a peer stays silent until there is something to send, so nobody waits for it.
    """
    own = target.settings.private_key.public()
    return {
        change.peer_id: Awaited(0.0, _pace(own, change.public_key))
        for change in done
        if isinstance(change, PutPeer) and change.is_new and change.endpoint is not None and change.keepalive
    }


def awaited_anew(public_keys: Iterable[PublicKey], target: Target, since: float) -> dict[str, Awaited]:
    """The peers, by id, with these public keys, whose sessions ended at `since` with our former key."""
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
    """The peers to wait for beyond this round, and the peers to look at in this round."""
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
    """The ids of the peers to begin anew in this round, and the peers to wait for after it.

    A peer that was already out of touch before our new key is in neither.
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
