"""Keys of real agents are rotated under pings: the peer stays, and both ends have one key."""

from __future__ import annotations

import time
from functools import partial

from plexd.lab.nodes import NodeProcess
from tests.namespaces import marks
from tests.rotation.pair import Pair, running_pair

pytestmark = marks(seconds=180)


def new_and_agreed(pair: Pair, node: NodeProcess, seen: set[str]) -> bool:
    return pair.public_key(node) not in seen and pair.agree()


def rotate_in_turn(pair: Pair, rotations: int) -> None:
    """Pings come through again after each, and no end is left with another key or without its peer."""
    seen = {pair.public_key(node) for node in pair.nodes}
    with pair.ping(pair.nodes[0]) as pings:
        for number in range(rotations):
            node = pair.nodes[number % 2]
            pair.order_rotation(node)
            pair.wait("the new key", partial(new_and_agreed, pair, node, seen))
            seen.add(pair.public_key(node))
            pair.wait("pings", partial(pings.came_since, time.time()))
    assert len(seen) == 2 + rotations
    assert len(pair.preshared_keys()) == 1


def test_rotations_under_traffic_lose_no_peer() -> None:
    with running_pair("plexd-rt") as pair:
        rotate_in_turn(pair, 4)


def test_handshakes_that_cross_on_a_long_way_lose_no_peer() -> None:
    with running_pair("plexd-rt", way_seconds=0.05) as pair:
        rotate_in_turn(pair, 2)


def test_both_keys_rotated_at_once_end_with_two_new_ones() -> None:
    with running_pair("plexd-rt") as pair:
        before = {pair.public_key(node) for node in pair.nodes}
        for node in pair.nodes:
            pair.order_rotation(node)
        for node in pair.nodes:
            pair.wait("the new key", partial(new_and_agreed, pair, node, before))
            pair.wait("pings", partial(pair.reaches, node))
        assert len(pair.preshared_keys()) == 1
