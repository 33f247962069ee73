"""The ways to the peers' endpoints, of which the narrowest sets the MTU of the mesh (docs/contract/mesh.md §3).

Which way packets take, only the kernel can tell: rules may send them to any table, and a longest match over table main
would not see that. So it is asked, once for each address: 10 to 20 microseconds, which 10 000 peers at every look would
make the most expensive thing that the agent does. Answers are kept until a notification says that they may be others
now, and no longer than ten minutes, because there are changes of which none tells (next hop objects, an MTU that a
router advertises). The MTUs of the few links that the ways leave by are read at every look.

Pure: `network` asks and `notifications` listens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping

from plexd.linux.links import LinkState
from plexd.linux.routes import Way
from plexd.mesh.address import Prefix

WAYS_KEPT_SECONDS = 600.0


class Underlay:
    """`links` are those that the last look found packets leave by, `mtu` what that look made of them, None: no way out.

    `is_followed` says that somebody wants to know; otherwise nothing of this is of any concern. `epoch` counts how
    often the ways were forgotten: what was asked before is no answer after.
    """

    def __init__(self) -> None:
        self.is_followed = False
        self.links: Mapping[int, LinkState] = {}
        self.mtu: int | None = None
        self.epoch = 0
        self.ways: frozenset[Way] = frozenset()
        self._ways: dict[bytes, Way | None] = {}  # None: no way, or asked for just now
        self._ordered: dict[int, list[bytes]] | None = None
        self._since = 0.0

    def follow(self, endpoints: Collection[bytes], now: float) -> list[bytes]:
        """From now on these addresses count, and no others; those whose way has to be asked for."""
        self.is_followed = True
        if now - self._since > WAYS_KEPT_SECONDS:
            self.forget()
            self._since = now
        gone = self._ways.keys() - endpoints
        for endpoint in gone:
            del self._ways[endpoint]
        if gone:
            self._ordered = None
            self.ways = frozenset(way for way in self._ways.values() if way is not None)
        return self.follow_too(endpoints)

    def follow_too(self, endpoints: Iterable[bytes]) -> list[bytes]:
        """These addresses count as well; those whose way has to be asked for."""
        unknown = [endpoint for endpoint in endpoints if endpoint not in self._ways]
        if unknown:
            self._ways.update(dict.fromkeys(unknown))  # a change that is told before the answer comes is about them too
            self._ordered = None
        return unknown

    def learn(self, answers: Mapping[bytes, Way | None], epoch: int) -> None:
        """What the kernel answered to a question of `epoch`."""
        if epoch == self.epoch:
            self._ways.update(answers)
            self.ways |= {way for way in answers.values() if way is not None}

    def forget(self) -> None:
        """The ways may be others now."""
        self.epoch += 1
        self.ways = frozenset()
        self._ways.clear()
        self._ordered = None

    def leads_to_any(self, prefix: Prefix) -> bool:
        """Whether a route with this prefix may be the way to one of the addresses."""
        if self._ordered is None:
            self._ordered = {size: sorted(packed for packed in self._ways if len(packed) == size) for size in (4, 16)}
        addresses = self._ordered[len(prefix.packed)]
        nearest = bisect_left(addresses, prefix.packed)
        return nearest < len(addresses) and prefix.contains(addresses[nearest])


def narrowest(ways: Iterable[Way], links: Mapping[int, LinkState]) -> int | None:
    """The smallest MTU among the ways, by the `links` that are left; None without a way."""
    mtus = (
        way.mtu or min((links[ifindex].mtu for ifindex in way.ifindexes if ifindex in links), default=0) for way in ways
    )
    return min((mtu for mtu in mtus if mtu), default=None)
