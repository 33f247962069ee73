"""WireGuard keys rotated between two real agents, by event, under a ping every 10 ms: how long it goes unanswered.

The nodes take turns, so that half of the rotations are of the node that sends the pings and half of the one that
answers them. Between nodes that are far apart the handshakes of both ends are under way at the same time.
"""

from __future__ import annotations

import statistics
import time

from plexd.lab.nodes import NodeProcess
from tests.bench.figure import Figure, percentile
from tests.rotation.pair import Pair, Pings, running_pair

LAB = "plexd-rot"
ROTATIONS = 200
ROTATIONS_FAR, WAY_SECONDS = 40, 0.05
BETWEEN_SECONDS = 0.3
AFTER_SECONDS = 0.2


def measure() -> list[Figure]:
    return [*_measure(ROTATIONS), *_measure(ROTATIONS_FAR, WAY_SECONDS)]


def _measure(rotations: int, way_seconds: float = 0.0) -> list[Figure]:
    with running_pair(LAB, way_seconds) as pair:
        sender = pair.nodes[0]
        gaps: dict[str, list[float]] = {"pings": [], "answers": []}
        with pair.ping(sender) as pings:
            pair.wait("pings", lambda: len(pings.replies) > 100)
            for number in range(rotations):
                rotated = pair.nodes[number % 2]
                gaps["pings" if rotated is sender else "answers"].append(_rotate(pair, pings, rotated))
        if not pair.agree() or len(pair.preshared_keys()) != 1:
            raise RuntimeError("a peer was lost, or the ends do not agree")
    every = [seconds * 1000 for seconds in (*gaps["pings"], *gaps["answers"])]
    name = f"{rotations} key rotations, pings unanswered"
    if way_seconds:
        name = f"{rotations} key rotations {2000 * way_seconds:.0f} ms apart, pings unanswered"
    return [
        Figure(f"{name}, median", statistics.median(every), "ms", None if way_seconds else 200),
        Figure(f"{name}, p90", percentile(every, 90), "ms"),
        Figure(f"{name}, p99", percentile(every, 99), "ms"),
        Figure(f"{name}, longest", max(every), "ms", 6000),
        *(
            Figure(f"the same of the node that {who}, {how}", which(seconds) * 1000, "ms")
            for who, seconds in gaps.items()
            for how, which in (("median", statistics.median), ("longest", max))
        ),
    ]


def _rotate(pair: Pair, pings: Pings, node: NodeProcess) -> float:
    before = pair.public_key(node)
    started = time.time()
    pair.order_rotation(node)
    pair.wait("the new key", lambda: pair.public_key(node) != before and pair.agree())
    agreed = time.time()
    pair.wait("pings", lambda: pings.came_since(agreed + AFTER_SECONDS))
    gap = pings.longest_gap(started, time.time())
    time.sleep(BETWEEN_SECONDS)
    return gap


if __name__ == "__main__":
    for figure in measure():
        print(figure.line())
