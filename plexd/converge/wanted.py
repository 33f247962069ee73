"""What is wanted of the mesh: the target made of the snapshot, and what was left out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from plexd.converge.endpoint_trials import EndpointTrials
from plexd.log import get_logger
from plexd.mesh.address import Endpoint
from plexd.mesh.admission import Admitted, amend, judge
from plexd.mesh.amend import rebuild
from plexd.mesh.desired import Candidates, Desired
from plexd.mesh.observed import Observed, Route
from plexd.mesh.target import Built, Settings, Sources, Target, Warned
from plexd.mesh.temporary_allows import TemporaryAllows
from plexd.node.state import Node
from plexd.runtime.threads import in_mesh_thread
from plexd.store.identity import Identity

log = get_logger("mesh")

WORTH_A_THREAD = 1000  # peers and rules to judge: some milliseconds


class Wanted:
    """`settings` turns an identity into what this node brings along, None while the node has no private key.

    `resolved` maps endpoint names to addresses; the name resolution writes it. `temporary_allows` are services that are
    let in for a while. Changes to either count from the next `apply_event` or pass on. `on_unresolved` is told of names
    that have no address yet.
    """

    def __init__(self, node: Node, settings: Callable[[Identity], Settings | None], trials: EndpointTrials) -> None:
        self.resolved: dict[str, Endpoint] = {}
        self.temporary_allows = TemporaryAllows()
        self.on_unresolved: Callable[[], None] = lambda: None
        self._node = node
        self._settings = settings
        self._trials = trials
        self._built: Built | None = None
        self._admitted: Admitted | None = None
        self._warned: frozenset[tuple[str, str]] = frozenset()
        self._misses_ipv6 = False

    async def target(self) -> Target | None:
        """What the kernel should hold now; None while the node has no private key."""
        sources = self._sources()
        if sources is None:
            return None
        built = rebuild(self._built, sources)
        if built is not self._built:
            self._built = built
            self._warn(built.target.warnings)
            if built.target.unresolved:
                self.on_unresolved()
        self._admitted = await self._admit(built)
        return self._admitted.target

    async def preview(self) -> Admitted | None:
        """What the next pass will want. Nothing is remembered of it."""
        sources = self._sources()
        if sources is None:
            return None
        return await self._admit(rebuild(self._built, sources))

    @property
    def desired(self) -> Desired:
        return self._node.desired

    @property
    def candidates(self) -> Mapping[str, Candidates]:
        """The endpoint candidates that the last target was made of."""
        return self._built.sources.desired.candidates if self._built is not None else {}

    def is_wanted(self, route: Route) -> bool:
        """Whether the last target has this route."""
        return self._admitted is not None and route in self._admitted.target.routes

    def note_ipv6(self, target: Target, observed: Observed) -> None:
        """Log once that prefixes get no route for want of IPv6, and again only after the host had IPv6."""
        is_missed = not observed.ipv6 and any(len(route.prefix.packed) == 16 for route in target.routes)
        if is_missed and not self._misses_ipv6:
            log.warning("left out of the mesh", what="no_ipv6", detail="this host has no IPv6: none of it is routed")
        self._misses_ipv6 = is_missed

    async def _admit(self, built: Built) -> Admitted:
        """In a thread when there are many peers and rules, so that the loop stays free for others."""
        asked = (built.target, built.sources.desired, self.temporary_allows)
        admitted = amend(self._admitted, *asked)
        if admitted is not None:
            return admitted
        policies = built.sources.desired.policies
        if len(built.target.peers) + sum(len(policy.rules) for policy in policies) < WORTH_A_THREAD:
            return judge(*asked)
        return await in_mesh_thread(judge, *asked)

    def _sources(self) -> Sources | None:
        settings = self._settings(self._node.identity)
        if settings is None:
            return None
        desired = self._node.desired
        return Sources(desired, settings, dict(self.resolved), self._trials.overridden(desired.candidates))

    def _warn(self, warnings: Sequence[Warned]) -> None:
        """Log each thing that was left out of the target once, and again only after it had gone."""
        seen = {(warning.code, warning.subject): warning for warning in warnings}
        for key, warning in seen.items():
            if key not in self._warned:
                log.warning("left out of the mesh", what=warning.code, detail=warning.text)
        self._warned = frozenset(seen)
