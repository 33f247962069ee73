"""The mesh as a resource of a pass: the mesh interface and its nftables table.

The table comes first. Where the kernel refuses a new table the old one stays, and no peer is added that the old table
was not made for; without any table the interface is down (docs/contract/mesh.md §6.7).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from plexd.converge.endpoint_trials import EndpointTrials
from plexd.converge.handshake_retries import HandshakeRetries
from plexd.converge.mesh_log import log_failed_pass, log_peers, why_down
from plexd.converge.wanted import Wanted
from plexd.errors import KernelError
from plexd.log import get_logger
from plexd.mesh.changes import (
    Change,
    CreateLink,
    DeviceChange,
    Outcome,
    PutPeer,
    RemovePeer,
    RemoveTable,
    ReplaceTable,
    SetDown,
    Subject,
    TableChange,
)
from plexd.mesh.desired import NO_CANDIDATES, Candidates
from plexd.mesh.drift import Correction, pass_corrections
from plexd.mesh.fallback import next_endpoints, peers_with_a_choice
from plexd.mesh.firewall import ruleset
from plexd.mesh.handshakes import Awaited, assess, plan_again
from plexd.mesh.observed import Backend, Observed
from plexd.mesh.plan import plan, plan_event, plan_network, plan_table, withhold
from plexd.mesh.repair_limiter import shut
from plexd.mesh.target import Target
from plexd.node.health import Condition, Health

log = get_logger("mesh")


class Interface(Protocol):
    """A WireGuard interface; `linux.interface.Interface` is the real one."""

    @property
    def name(self) -> str: ...

    async def observe(self, endpoints: Collection[bytes] | None = None, *, device: bool = True) -> Observed:
        """Without `device` the look leaves out keys and peers. With `endpoints`, the packed addresses of the peers'
        endpoints, the look measures the MTU of the ways to them. Raises KernelError."""

    async def apply(self, changes: Sequence[DeviceChange]) -> list[Outcome]:
        """Try each change; the outcome of one that failed says why."""


class Table(Protocol):
    """An nftables table; `linux.firewall.FirewallTable` is the real one."""

    @property
    def name(self) -> str: ...

    async def observe(self) -> str | None:
        """The digest of the ruleset in force; "" for an unknown table, None for none. Raises KernelError."""

    async def apply(self, changes: Sequence[TableChange]) -> list[Outcome]:
        """Try each change; the outcome of one that failed says why."""

    async def read(self) -> Any | None:
        """The table as nft tells it, None when there is none. Raises KernelError."""


@dataclass(slots=True)
class Applied:
    """What this process has brought into the kernel.

    `since` tells when a peer was put on the interface, in Unix seconds by peer id; `policies_applied_at` when the
    policies in force were, None before. `rejected` is the digest of the ruleset that the kernel refused last.
    `may_have_table` is False once it is known that no table is left of an earlier run that enforced policies.
    """

    target: Target | None = None
    candidates: Mapping[str, Candidates] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)
    policies_applied_at: float | None = None
    rejected: str | None = None
    may_have_table: bool = True
    has_ipv6: bool = True  # the interface, by the last look


@dataclass(frozen=True, slots=True)
class Seen:
    """A look at the kernel. `table` is the digest of the ruleset in force, see `Table.observe`."""

    interface: Observed
    table: str | None

    @property
    def is_up(self) -> bool:
        return self.interface.link is not None and self.interface.link.up


class Mesh:
    """`up` is set while the interface can carry packets. `on_created` is told when a pass has created the interface."""

    def __init__(
        self,
        interface: Interface,
        table: Table,
        wanted: Wanted,
        trials: EndpointTrials,
        retries: HandshakeRetries,
        health: Health,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.subject = Subject(interface.name, table.name)
        self.up = asyncio.Event()
        self.on_created: Callable[[], None] = lambda: None
        self.applied = Applied()
        self._interface = interface
        self._table = table
        self._wanted = wanted
        self._trials = trials
        self._retries = retries
        self._health = health
        self._now = now

    # the pass

    async def look(self, *, whole: bool) -> MeshLook | None:
        target = await self._wanted.target()
        if target is None:
            self._set_down("the private key is lost; a new one is being agreed on")
            return None
        before = self.applied.target
        # an equal target may be another object, after a change and its opposite
        is_repair = target is before or target == before
        seen, due = await self._plan(target, whole=whole or target is not before)
        return MeshLook(self, target, seen, due, is_repair, self._now())

    async def _plan(self, target: Target, *, whole: bool) -> tuple[Seen, tuple[Change, ...]]:
        endpoints = None if target.settings.mtu else target.endpoints()
        if not whole:
            seen = await self._see(target, endpoints, device=False)
            steps = plan_network(target, seen.interface)
            if steps is not None:
                return seen, (*plan_table(target.firewall, seen.table), *steps)
        seen = await self._see(target, endpoints, device=True)
        if target.firewall is None and seen.table is not None:
            await self._remove_table()
        self.applied.may_have_table = target.firewall is not None
        moved = frozenset(filter(self._is_moved, self._wanted.candidates)) if self.applied.target is not None else None
        steps = plan(target, seen.interface, self._now(), moved or frozenset())
        return seen, (*plan_table(target.firewall, seen.table), *steps)

    async def _see(self, target: Target, endpoints: Collection[bytes] | None, *, device: bool) -> Seen:
        observed = await self._interface.observe(endpoints, device=device)
        is_of_interest = target.firewall is not None or self.applied.may_have_table
        table = await self._table.observe() if is_of_interest else None
        self.applied.has_ipv6 = observed.ipv6
        self._wanted.note_ipv6(target, observed)
        return Seen(observed, table)

    async def _remove_table(self) -> None:
        """No policy is enforced (any more), but a table that an earlier run left would go on enforcing."""
        (outcome,) = await self._table.apply([RemoveTable()])
        if outcome.error is not None:
            log.warning("firewall of an earlier run not removed", error=outcome.error)

    def failed(self, error: KernelError, *, is_news: bool) -> None:
        is_down = log_failed_pass(self.subject, error, is_up=self.up.is_set(), is_news=is_news)
        if is_down:
            self._set_down(str(error))

    # events and what else happens between two passes

    async def look_at_event(self) -> MeshStep | None:
        target = await self._wanted.target()
        if self.applied.target is None or target is None:
            return None  # the first pass has not been through yet and will bring everything
        return MeshStep(self, target, self._plan_event(target, self._is_moved), self._now())

    async def look_at_endpoints(self) -> MeshStep | None:
        """Move peers that cannot be reached on to their next endpoint candidate."""
        target, desired = await self._wanted.target(), self._wanted.desired
        if self.applied.target is None or target is None or not peers_with_a_choice(desired):
            return self._nothing()
        device = (await self._interface.observe()).device
        if device is None:
            return self._nothing()
        now = asyncio.get_running_loop().time()
        on_trial = self._trials.on_trial(desired.peers, now)
        moves = next_endpoints(desired, target, self._wanted.resolved, device, on_trial, self._now())
        if not moves:
            return self._nothing()
        self._trials.override(moves, desired.candidates)
        target = await self._wanted.target() or target
        changes = self._plan_event(target, lambda peer_id: peer_id in moves or self._is_moved(peer_id))
        return MeshStep(self, target, changes, self._now(), moves)

    async def look_at_handshakes(self, due: Mapping[str, Awaited], seen: Target, observed: Observed) -> MeshStep | None:
        """Have peers begin their handshake anew that `observed` shows without one. `due` was wanted as in `seen`.

        A peer that an event has changed since the look is left alone.
        """
        target, link, device = self.applied.target, observed.link, observed.device
        if link is None or device is None or target is None:
            return self._nothing()
        if target.settings.private_key != device.private_key:
            return self._nothing()
        due = {peer_id: due[peer_id] for peer_id in due if target.peers.get(peer_id) == seen.peers.get(peer_id)}
        again, left = assess(due, target, device, may_be_deaf=link.backend is Backend.USERSPACE)
        self._retries.settle(due, left)
        if again:
            log.debug("handshakes tried again", peers=len(again))
        return MeshStep(self, target, plan_again(again, target, device), self._now(), is_about_sessions=True)

    def _nothing(self) -> MeshStep | None:
        return MeshStep(self, self.applied.target, (), self._now()) if self.applied.target is not None else None

    def _plan_event(self, target: Target, is_moved: Callable[[str], bool]) -> tuple[Change, ...]:
        before = self.applied.target
        assert before is not None  # noqa: S101 - the callers have seen to it
        digest = before.firewall.digest if before.firewall is not None else None
        steps = plan_event(before, target, ipv6=self.applied.has_ipv6, is_moved=is_moved)
        return (*plan_table(target.firewall, digest), *steps)

    def _is_moved(self, peer_id: str) -> bool:
        """Whether the peer's endpoint candidate is news since the kernel was last brought in line.

        The candidate counts, not the address of a name: a changing answer of DNS moves no peer that is fresh.
        """
        was = self.applied.candidates.get(peer_id, NO_CANDIDATES)
        candidates = self._wanted.desired.candidates.get(peer_id, NO_CANDIDATES)
        return was is not candidates and candidates.is_news_since(was)

    # applying

    async def apply(self, changes: Sequence[Change], target: Target, seen: Seen | None) -> list[Outcome]:
        """Apply the table first, and what goes with the table only as far as the table is in force. Raises KernelError.

        `seen` is the look that the changes come from, None where the last applied target stands for it.
        """
        table = [change for change in changes if isinstance(change, TableChange)]
        rest: Sequence[DeviceChange] = [change for change in changes if not isinstance(change, TableChange)]
        outcomes = await self._table.apply(table) if table else []
        if outcomes and outcomes[0].error is not None:
            if seen is not None and seen.table is None:
                assert target.settings.policy is not None  # noqa: S101 - there is a table to replace
                outcomes += await self._table.apply([ReplaceTable(ruleset(target.settings.policy))])
                if outcomes[-1].error is not None:
                    return outcomes + (await self._interface.apply([SetDown()]) if seen.is_up else [])
            before = self.applied.target
            rest = withhold(rest, before.peers if before is not None else ())
        return outcomes + (await self._interface.apply(rest) if rest else [])

    def remember(self, outcomes: Sequence[Outcome], target: Target, begun: float) -> None:
        """Remember what was reached by changes that were applied from `begun` on, in Unix seconds."""
        applied = self.applied
        done = [outcome.change for outcome in outcomes if outcome.error is None]
        if len(done) == len(outcomes):
            applied.target, applied.candidates = target, self._wanted.candidates
        removed = [change.peer_id for change in done if isinstance(change, RemovePeer)]
        if None in removed:  # a pass does not know removed peers by their ids
            applied.since = {peer_id: at for peer_id, at in applied.since.items() if peer_id in target.peers}
        for peer_id in removed:
            if peer_id is not None and peer_id not in target.peers:
                applied.since.pop(peer_id, None)
        now = self._now()
        put = [change for change in done if isinstance(change, PutPeer)]
        applied.since |= {change.peer_id: now for change in put if change.is_new}
        moved = [change.peer_id for change in put if change.endpoint is not None]
        if moved:
            self._trials.note(moved, asyncio.get_running_loop().time())
        if target.firewall is not None and ReplaceTable(target.firewall) in done:
            applied.policies_applied_at = now
            log.info("policies applied", policies=len(self._wanted.desired.policies), rules=target.firewall.rules)
        log_peers(done, len(target.peers))
        self._retries.note(outcomes, target, begun)

    def settle(self, look: MeshLook, changes: Sequence[Change], outcomes: Sequence[Outcome]) -> tuple[Correction, ...]:
        """After a pass: remember what was reached; the corrections that a drift report would hold."""
        before = self.applied.target
        if before is None:
            self._trials.restart(asyncio.get_running_loop().time())
        known_ids = {peer.public_key: peer.id for peer in before.peers.values()} if before is not None else {}
        known_table = before.firewall.digest if before is not None and before.firewall is not None else None
        self.remember(outcomes, look.target, look.begun)
        self._set_down(why_down(self.subject.interface, look.due, changes, outcomes))
        succeeded = all(outcome.error is None for outcome in outcomes)
        created = any(isinstance(outcome.change, CreateLink) for outcome in outcomes)
        if succeeded and (created or before is None):
            message = "interface up" if created else "interface adopted"
            log.info(message, interface=self.subject.interface, peers=len(look.target.peers))
        if created and self.up.is_set():
            self.on_created()
        corrections = pass_corrections(self.subject, outcomes, known_ids, known_table)
        if created and before is None:  # setting the interface up at start repairs nothing
            corrections = ()
        return corrections + self._rejection(outcomes)

    def _rejection(self, outcomes: Sequence[Outcome]) -> tuple[Correction, ...]:
        """A table that the kernel refuses is reported once, until another table is wanted."""
        for change, error, _ in outcomes:
            if isinstance(change, ReplaceTable):  # the first; a baseline in its place may follow
                known = self.applied.rejected
                self.applied.rejected = change.ruleset.digest if error is not None else None
                is_news = error is not None and self.applied.rejected != known
                return (Correction("policy_rejected", error or ""),) if is_news else ()
        return ()

    def _set_down(self, reason: str | None) -> None:
        """None: the interface can carry packets."""
        self._health.set(Condition.MESH_DOWN, reason is not None, reason or "")
        if reason is None:
            self.up.set()
        else:
            self.up.clear()


@dataclass(frozen=True, slots=True)
class MeshLook:
    """`begun` is when the look was taken, in Unix seconds."""

    mesh: Mesh
    target: Target
    seen: Seen
    due: tuple[Change, ...]
    is_repair: bool
    begun: float

    def admit(self, admitted: tuple[Change, ...]) -> tuple[Change, ...]:
        return shut(self.due, admitted, is_up=self.seen.is_up)

    async def apply(self, changes: Sequence[Change]) -> list[Outcome]:
        return await self.mesh.apply(changes, self.target, self.seen)

    def settle(self, changes: Sequence[Change], outcomes: Sequence[Outcome]) -> tuple[Correction, ...]:
        return self.mesh.settle(self, changes, outcomes)


@dataclass(frozen=True, slots=True)
class MeshStep:
    """Changes between two passes, which report no corrections. `moves` are endpoints to try, by peer id.

    A step that `is_about_sessions` takes peers out and puts them back: the target stays what it was.
    """

    mesh: Mesh
    target: Target
    due: tuple[Change, ...]
    begun: float
    moves: Mapping[str, str] = field(default_factory=dict)
    is_about_sessions: bool = False
    is_repair: bool = False

    def admit(self, admitted: tuple[Change, ...]) -> tuple[Change, ...]:
        return admitted

    async def apply(self, changes: Sequence[Change]) -> list[Outcome]:
        return await self.mesh.apply(changes, self.target, None)

    def settle(self, changes: Sequence[Change], outcomes: Sequence[Outcome]) -> tuple[Correction, ...]:  # noqa: ARG002
        if not self.is_about_sessions:
            self.mesh.remember(outcomes, self.target, self.begun)
        for peer_id, endpoint in self.moves.items():
            log.debug("next endpoint tried", peer=peer_id, endpoint=endpoint)
        return ()
