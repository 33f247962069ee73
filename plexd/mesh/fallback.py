"""Decides which peers move on to their next endpoint candidate, because the endpoint in use does not answer. Pure.

A peer gets from a dead direct path to a relay, which is an ordinary endpoint, and back, without waiting for the control
plane (docs/contract/mesh.md §8.6).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from plexd.mesh.address import Endpoint
from plexd.mesh.desired import Candidates, Desired
from plexd.mesh.observed import Device, is_fresh
from plexd.mesh.target import Target, usable_endpoint


def peers_with_a_choice(desired: Desired) -> tuple[str, ...]:
    """The peers with more than one candidate. For most peers all sources name the same endpoint."""
    return tuple(
        peer_id
        for peer_id, candidates in desired.candidates.items()
        if len(candidates.offers) > 1 and len(set(candidates.newest_first())) > 1
    )


def next_endpoints(
    desired: Desired,
    target: Target,
    resolved: Mapping[str, Endpoint],
    device: Device,
    lately_set: AbstractSet[str],
    now: float,
) -> dict[str, str]:
    """The candidate to use from now on, for each peer that has to move; `now` in Unix seconds.

    `lately_set` are the peers whose endpoint was set too recently to be judged. A peer with a fresh handshake is never
    moved.
    """
    moves: dict[str, str] = {}
    for peer_id in peers_with_a_choice(desired):
        peer = target.peers.get(peer_id)
        held = device.peers.get(peer.public_key) if peer is not None else None
        if peer is None or held is None or peer_id in lately_set:
            continue
        if is_fresh(held.last_handshake, now):
            continue
        choice = _distinct(desired.candidates[peer_id], target, resolved)
        if len(choice) < 2:
            continue
        endpoints = list(choice)
        # a peer whose endpoint is no candidate (any more) starts with the newest candidate
        position = endpoints.index(peer.endpoint) if peer.endpoint in choice else -1
        moves[peer_id] = choice[endpoints[(position + 1) % len(endpoints)]]
    return moves


def _distinct(candidates: Candidates, target: Target, resolved: Mapping[str, Endpoint]) -> dict[Endpoint, str]:
    """The usable candidates with their texts, newest first."""
    found: dict[Endpoint, str] = {}
    for text in candidates.newest_first():
        endpoint = usable_endpoint(text, target.settings, resolved)
        if endpoint is not None:
            found.setdefault(endpoint, text)
    return found
