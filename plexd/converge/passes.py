"""Observe, plan, apply: the one routine that changes the kernel.

A pass looks at everything and repairs what differs; one that notifications woke leaves the peers out, of which none
tell. An event is applied from two targets, before and after, without a look; should the kernel refuse, the next pass
repairs. All of it runs under one lock.

The firewall goes first. Where the kernel refuses a new one the old one stays and no peer is added that it was not made
for; where there is none at all the interface is not up (mesh contract, section 6.7).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

from plexd.errors import ForeignLink, KernelError, NotAddressable, NotPermitted
from plexd.log import get_logger
from plexd.mesh.address import Endpoint
from plexd.mesh.admission import Admitted, amend, judge
from plexd.mesh.amend import rebuild
from plexd.mesh.changes import (
    Change,
    CreateLink,
    Outcome,
    PutPeer,
    RemoveFirewall,
    RemovePeer,
    RenewSessions,
    ReplaceFirewall,
    SetDevice,
    SetDown,
)
from plexd.mesh.desired import NO_CANDIDATES, Candidates
from plexd.mesh.drift import Correction, interface_corrections
from plexd.mesh.fallback import next_endpoints, peers_with_a_choice
from plexd.mesh.firewall import Hits, TemporaryAllows, hits, ruleset
from plexd.mesh.handshakes import Awaited, assess, awaited_anew, awaited_new, next_round, plan_again
from plexd.mesh.keys import PrivateKey
from plexd.mesh.observed import Backend, Observed, Route, is_fresh
from plexd.mesh.plan import plan, plan_event, plan_network, withhold
from plexd.mesh.policy import Resolved
from plexd.mesh.repair_limiter import RepairLimiter, contest_correction, leaves_firewall, shut
from plexd.mesh.target import Built, Settings, Sources, Target, Warned
from plexd.node.control_calls import MeshStatus
from plexd.node.health import Condition, Health
from plexd.node.state import Node
from plexd.runtime.threads import in_mesh_thread
from plexd.store.identity import Identity

log = get_logger("mesh")

STATUS_SECONDS = 1.0
WORTH_A_THREAD = 1000  # peers and rules to judge: some milliseconds
ENDPOINT_TRIAL_SECONDS = 30.0  # what an endpoint gets before another candidate is tried

_NO_MESH = (ForeignLink, NotAddressable, NotPermitted)  # what a look fails with where there can be none


class Kernel(Protocol):
    """The door to the kernel; `linux.kernel.Kernel` is the real one."""

    async def observe(
        self, endpoints: Collection[bytes] | None = None, *, device: bool = True, firewall: bool = True
    ) -> Observed:
        """Without `device` what WireGuard knows of it, above all the peers, is left out.

        With `endpoints`, the addresses of the peers' endpoints, it says how much goes to them at a time.
        """

    async def apply(self, changes: Sequence[Change]) -> list[Outcome]:
        """Take each step on its own; what failed says so in its outcome."""

    async def read_firewall(self) -> Any | None:
        """The table as nft tells it, None when there is none. Raises KernelError."""


@dataclass(frozen=True, slots=True)
class PassResult:
    """`changed` and `failed` count changes; `corrections` are what a drift report would hold.

    `due` is when a contested object is to be looked at again, in the loop's time.
    """

    changed: int
    failed: int
    corrections: tuple[Correction, ...]
    due: float | None = None


class Converger:
    """Keeps the kernel equal to the node's desired snapshot, whenever asked to.

    `settings` turns an identity into what this node brings along, None while it has no private key. `resolved` maps
    endpoint names to addresses and is read at every pass; others may write it. `clean` is set while the last try, pass
    or event, succeeded in everything. `since` tells when this process put a peer on the interface, in Unix seconds by
    peer id, `policies_applied_at` when it put the policies in force, None before.
    `contested` is set by every pass that leaves an object for its time; who sees to that clears it.
    `awaiting` is set while peers ought to shake hands, and `try_handshakes_again` is due every little while.
    `temporary_allows` are services that are let in for a while; they count from the next `apply_event` or pass on.
    """

    def __init__(
        self,
        kernel: Kernel,
        node: Node,
        settings: Callable[[Identity], Settings | None],
        health: Health,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.resolved: dict[str, Endpoint] = {}
        self.up = asyncio.Event()
        self.on_created: Callable[[], None] = lambda: None
        self.on_unresolved: Callable[[], None] = lambda: None
        self.clean = asyncio.Event()
        self.contested = asyncio.Event()
        self.awaiting = asyncio.Event()
        self.since: dict[str, float] = {}
        self.policies_applied_at: float | None = None
        self.temporary_allows = TemporaryAllows()
        self._kernel = kernel
        self._node = node
        self._settings = settings
        self._health = health
        self._now = now
        self._lock = asyncio.Lock()
        self._applied: Target | None = None
        self._applied_candidates: Mapping[str, Candidates] = {}
        self._guard = RepairLimiter()
        self._built: Built | None = None
        self._admitted: Admitted | None = None
        self._may_be_left = True  # a firewall, although none is wanted (any more)
        self._rejected: str | None = None  # digest of the ruleset that the kernel refused last
        self._turned: dict[str, tuple[Candidates, str]] = {}  # peers off their newest candidate, and to which
        self._endpoint_set: dict[str, float] = {}  # when, in the loop's time, by peer; the latest last
        self._endpoints_since = 0.0  # those that were there before
        self._awaited: dict[str, Awaited] = {}
        self._renewed_under: PrivateKey | None = None  # the key with which sessions ended last
        self._warned: frozenset[tuple[str, str]] = frozenset()
        self._ipv6 = True  # whether the interface has it, by the last look
        self._missed_ipv6 = False
        self._failure = ""  # why the last pass could not be made

    async def converge(self) -> PassResult:
        """One pass over everything. A kernel that refuses shows in the result and in health, not as an exception."""
        return await self._pass(whole=True)

    async def repair(self) -> PassResult:
        """A pass over link, addresses and routes; over everything where that is not known to be enough."""
        return await self._pass(whole=False)

    async def _pass(self, *, whole: bool) -> PassResult:
        async with self._lock:
            target = await self._target()
            if target is None:
                self.clean.clear()
                self._set_down("the private key is lost; a new one is being agreed on")
                return PassResult(changed=0, failed=1, corrections=())
            first = self._applied is None
            known_ids = {peer.public_key: peer.id for peer in self._applied.peers.values()} if self._applied else {}
            known_firewall = self._applied.firewall.digest if self._applied and self._applied.firewall else None
            interface = target.settings.interface
            now = asyncio.get_running_loop().time()
            guard = self._guard
            try:
                whole = whole or target is not self._applied or not self.clean.is_set() or guard.leaves_damage
                observed, changes = await self._look(target, whole=whole)
                due = changes
                # what a changed target asks for is news and no repair, whoever fights over what was there before
                repairs = target is self._applied or target == self._applied
                if repairs:
                    guard, changes = guard.admit(interface, due, now)
                    changes = shut(due, changes, is_up=observed.link is not None and observed.link.up)
                begun = self._now()
                outcomes = await self._apply(changes, target, observed) if changes else []
            except KernelError as exc:
                self.clean.clear()
                # what nobody could look at stands as it was last seen
                is_down = isinstance(exc, _NO_MESH) or not self.up.is_set()
                if is_down:
                    self._set_down(str(exc))
                self._health.set(Condition.CHANGES_FAILED, True, str(exc))
                write = log.error if self._failure != str(exc) else log.debug
                write("mesh failed" if is_down else "mesh not looked at", interface=interface, error=str(exc))
                self._failure = str(exc)
                return PassResult(changed=0, failed=1, corrections=())
            self._failure = ""
            if first:
                self._endpoints_since = now
            failed = self._note(outcomes, target)
            self._tell(outcomes, target)
            self._await_handshakes(outcomes, target, begun)
            self._set_down(_why_down(interface, due, changes, outcomes))
            self._health.set(Condition.CHANGES_FAILED, bool(failed), _first_error(outcomes))
            if failed:
                self.clean.clear()
            else:
                self.clean.set()
            if repairs:
                guard = guard.record(interface, [o.change for o in outcomes if o.error is None], now)
            contests = contest_correction(self._guard, guard)
            self._guard = guard
            self._health.set(Condition.REPAIR_CONTESTED, bool(guard.contested), ", ".join(guard.contested[:3]))
            if guard.due is not None:
                self.contested.set()
        created = any(isinstance(outcome.change, CreateLink) for outcome in outcomes)
        corrections = interface_corrections(interface, outcomes, known_ids, known_firewall)
        if created and not failed:
            log.info("interface up", interface=interface, peers=len(target.peers))
        elif first and not failed:
            log.info("interface adopted", interface=interface, peers=len(target.peers))
        if created and first:  # setting the interface up at start repairs nothing
            corrections = ()
        corrections += self._rejection(outcomes)
        if created and self.up.is_set():
            self.on_created()
        return PassResult(len(outcomes) - failed, failed, corrections + contests, guard.due)

    async def _look(self, target: Target, *, whole: bool) -> tuple[Observed, tuple[Change, ...]]:
        """What there is, and what there is to do. Raises KernelError."""
        endpoints = None if target.settings.mtu else target.endpoints()
        judged = target.firewall is not None or self._may_be_left
        if not whole:
            observed = await self._kernel.observe(endpoints, device=False, firewall=judged)
            changes = plan_network(target, observed)
            if changes is not None:
                self._note_ipv6(target, observed)
                return observed, changes
        observed = await self._kernel.observe(endpoints, firewall=judged)
        self._note_ipv6(target, observed)
        if target.firewall is None and observed.firewall is not None:
            await self._forget_firewall()
        self._may_be_left = target.firewall is not None
        return observed, plan(target, observed, self._now(), self._moved())

    def _note_ipv6(self, target: Target, observed: Observed) -> None:
        """One line for all prefixes that get no route for want of IPv6, and again only after there was some."""
        self._ipv6 = observed.ipv6
        is_missed = not observed.ipv6 and any(len(route.prefix.packed) == 16 for route in target.routes)
        if is_missed and not self._missed_ipv6:
            log.warning("left out of the mesh", what="no_ipv6", detail="this host has no IPv6: none of it is routed")
        self._missed_ipv6 = is_missed

    async def _apply(self, changes: Sequence[Change], target: Target, observed: Observed | None) -> list[Outcome]:
        """Take the steps; what goes with a firewall only as far as that one is in force. Raises KernelError.

        `observed` is the look they come from, None where the target last applied stands for it.
        """
        if not isinstance(changes[0], ReplaceFirewall):
            return await self._kernel.apply(changes)
        outcomes = await self._kernel.apply(changes[:1])
        rest: Sequence[Change] = changes[1:]
        if outcomes[0].error is not None:
            if observed is not None and observed.firewall is None:
                assert target.settings.policy is not None  # noqa: S101 - there is a firewall to replace
                outcomes += await self._kernel.apply([ReplaceFirewall(ruleset(target.settings.policy))])
                if outcomes[-1].error is not None:
                    down = [SetDown()] if observed.link is not None and observed.link.up else []
                    return outcomes + (await self._kernel.apply(down) if down else [])
            rest = withhold(rest, self._applied.peers if self._applied is not None else ())
        return outcomes + (await self._kernel.apply(rest) if rest else [])

    async def _apply_beside_a_pass(self, changes: Sequence[Change], target: Target) -> bool:
        """Whether all succeeded. Only a pass, which sees everything, clears what failed before. Raises KernelError."""
        begun = self._now()
        outcomes = await self._apply(changes, target, None) if changes else []
        self._tell(outcomes, target)
        self._await_handshakes(outcomes, target, begun)
        if self._note(outcomes, target):
            self.clean.clear()
            self._health.set(Condition.CHANGES_FAILED, True, _first_error(outcomes))
            return False
        return True

    async def _forget_firewall(self) -> None:
        """No policy is enforced (any more): a table that an earlier run left would go on doing so."""
        (outcome,) = await self._kernel.apply([RemoveFirewall()])
        if outcome.error is not None:
            log.warning("firewall of an earlier run not removed", error=outcome.error)

    def _rejection(self, outcomes: Sequence[Outcome]) -> tuple[Correction, ...]:
        """A refused firewall is reported once, until another one is wanted."""
        for change, error, _ in outcomes:
            if isinstance(change, ReplaceFirewall):  # the first; a baseline in its place may follow
                known, self._rejected = self._rejected, change.ruleset.digest if error is not None else None
                return (Correction("policy_rejected", error),) if error is not None and self._rejected != known else ()
        return ()

    async def apply_event(self) -> bool:
        """Bring what was folded in since the last look into the kernel; whether that succeeded.

        False asks for a pass. Nothing is observed: the messages are those of the peers that changed.
        """
        async with self._lock:
            target = await self._target()
            if self._applied is None or target is None:
                return False  # the first pass has not been through yet and will bring everything
            changes = plan_event(self._applied, target, ipv6=self._ipv6, is_moved=self._is_moved)
            try:
                return await self._apply_beside_a_pass(changes, target)
            except KernelError as exc:
                self.clean.clear()
                log.error("event not applied", error=str(exc))
                return False

    async def try_next_endpoints(self) -> None:
        """Move peers that cannot be reached on to their next endpoint candidate."""
        async with self._lock:
            target = await self._target()
            if self._applied is None or target is None or not peers_with_a_choice(self._node.desired):
                return
            try:
                device = (await self._kernel.observe(firewall=False)).device
                if device is None:
                    return
                moves = next_endpoints(
                    self._node.desired, target, self.resolved, device, self._lately_set(), self._now()
                )
                if not moves:
                    return
                self._turned |= {peer_id: (self._node.desired.candidates[peer_id], moves[peer_id]) for peer_id in moves}
                target = await self._target() or target
                changes = plan_event(
                    self._applied, target, ipv6=self._ipv6, is_moved=lambda i: i in moves or self._is_moved(i)
                )
                await self._apply_beside_a_pass(changes, target)
            except KernelError as exc:
                log.error("endpoints not changed", error=str(exc))
                return
        for peer_id, endpoint in moves.items():
            log.debug("next endpoint tried", peer=peer_id, endpoint=endpoint)

    def restart_endpoint_trials(self) -> None:
        """Every peer keeps its endpoint for as long as a new one gets: after a gap in time the age of a handshake does
        not tell whether the peer still answers, and the keepalive, which would make a new one, has had no turn.
        """
        self._endpoints_since = asyncio.get_running_loop().time()

    async def try_handshakes_again(self) -> bool:
        """A round for the peers that ought to shake hands, some of which begin anew; False when a pass is due.

        No event waits for the look, so a peer that one changes meanwhile is left alone.
        """
        self._awaited, due = next_round(self._awaited)
        if not self._awaited:
            self.awaiting.clear()
        seen = self._applied
        if not due or seen is None:
            return True
        try:
            observed = await self._kernel.observe(firewall=False)
            async with self._lock:
                target, link, device = self._applied, observed.link, observed.device
                if link is None or device is None or target is None:
                    return True
                if target.settings.private_key != device.private_key:
                    return True
                due = {peer_id: due[peer_id] for peer_id in due if target.peers.get(peer_id) == seen.peers.get(peer_id)}
                again, left = assess(due, target, device, may_be_deaf=link.backend is Backend.USERSPACE)
                changes = plan_again(again, target, device)
                outcomes = await self._kernel.apply(changes) if changes else []
        except KernelError as exc:
            log.error("handshakes not tried again", error=str(exc))
            return True
        for peer_id in due.keys() & self._awaited.keys():
            if peer_id in left:
                self._awaited[peer_id] = left[peer_id]
            else:
                del self._awaited[peer_id]
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        if failed:  # a peer that was taken out may be missing
            self.clean.clear()
            self._health.set(Condition.CHANGES_FAILED, True, _first_error(failed))
            log.error("handshakes not tried again", error=failed[0].error, count=len(failed))
        elif changes:
            log.debug("handshakes tried again", peers=len(changes) // 2)
        return not failed

    async def look(self) -> tuple[Target | None, Observed | None]:
        """What is wanted and what is there, for who explains the difference; nothing here remembers or repairs.

        No target while the node has no private key; no look when the kernel refuses one, or takes over a second.
        """
        try:
            async with asyncio.timeout(STATUS_SECONDS):
                observed = await self._kernel.observe(firewall=False)
        except (KernelError, TimeoutError) as exc:
            log.debug("interface not looked at", error=str(exc))
            observed = None
        admitted = await self._look_ahead()
        return admitted.target if admitted is not None else None, observed

    async def look_at_policies(self) -> tuple[Resolved, Mapping[tuple[str, int], Hits] | None]:
        """What the policies mean here, and what each rule (policy id, number) has met; None while that is not known."""
        admitted = await self._look_ahead()
        if admitted is None:
            return Resolved(), None
        try:
            async with asyncio.timeout(STATUS_SECONDS):
                table = await self._kernel.read_firewall()
        except (KernelError, TimeoutError) as exc:
            log.debug("firewall not looked at", error=str(exc))
            table = None
        return admitted.resolved, hits(table, admitted.resolved.rules) if table is not None else None

    async def _look_ahead(self) -> Admitted | None:
        """What the next pass will want; nothing is remembered of it."""
        sources = self._sources()
        if sources is None:
            return None
        return await self._admit(rebuild(self._built, sources))

    async def status(self) -> MeshStatus | None:
        """A fresh look for the heartbeat; None while there is no interface with a port, or no answer in a second."""
        try:
            async with asyncio.timeout(STATUS_SECONDS):
                observed = await self._kernel.observe(firewall=False)
        except (KernelError, TimeoutError):
            return None
        if observed.link is None or observed.device is None or not observed.device.listen_port:
            return None  # the last is a link that was made by a pass which then failed
        now = self._now()
        fresh = sum(is_fresh(peer.last_handshake, now) for peer in observed.device.peers.values())
        return MeshStatus(observed.link.name, fresh, observed.device.listen_port)

    def is_wanted(self, route: Route) -> bool:
        """Whether it belongs to the mesh, by what was last made of the snapshot."""
        return self._admitted is not None and route in self._admitted.target.routes

    async def _target(self) -> Target | None:
        """None while the node has no private key."""
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

    async def _admit(self, built: Built) -> Admitted:
        """Many at once in a thread, so that the loop stays free for others."""
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
        # news of a peer's endpoint ends its turning
        self._turned = {i: turn for i, turn in self._turned.items() if desired.candidates.get(i) == turn[0]}
        turned = {peer_id: text for peer_id, (_, text) in self._turned.items()}
        return Sources(desired, settings, dict(self.resolved), turned)

    def _moved(self) -> frozenset[str]:
        """Peers whose endpoint candidate is news since the kernel was last brought in line."""
        if self._applied is None:
            return frozenset()
        return frozenset(filter(self._is_moved, self._node.desired.candidates))

    def _is_moved(self, peer_id: str) -> bool:
        """By the candidate, not by the address of a name: a changing answer of DNS moves no peer that is fresh."""
        was = self._applied_candidates.get(peer_id, NO_CANDIDATES)
        candidates = self._node.desired.candidates.get(peer_id, NO_CANDIDATES)
        return was is not candidates and candidates.is_news_since(was)

    def _lately_set(self) -> frozenset[str]:
        """Peers whose endpoint may still work out."""
        before = asyncio.get_running_loop().time() - ENDPOINT_TRIAL_SECONDS
        if self._endpoints_since > before:
            return frozenset(self._node.desired.peers)
        self._forget_old_endpoints()
        return frozenset(self._endpoint_set)

    def _forget_old_endpoints(self) -> None:
        before = asyncio.get_running_loop().time() - ENDPOINT_TRIAL_SECONDS
        for peer_id in list(takewhile(lambda i: self._endpoint_set[i] <= before, self._endpoint_set)):
            del self._endpoint_set[peer_id]

    def _set_down(self, reason: str | None) -> None:
        """None: there is an interface."""
        self._health.set(Condition.MESH_DOWN, reason is not None, reason or "")
        if reason is None:
            self.up.set()
        else:
            self.up.clear()

    def _note(self, outcomes: Sequence[Outcome], target: Target) -> int:
        """Remember what was reached, log what was not, one line for each cause; the number that failed."""
        failures = [outcome for outcome in outcomes if outcome.error is not None]
        for error, count in Counter(outcome.error for outcome in failures).most_common(10):
            first = next(outcome.change for outcome in failures if outcome.error == error)
            log.error("change failed", change=type(first).__name__, error=error, count=count)
        if not failures and self._built is not None:
            self._applied = target
            self._applied_candidates = self._built.sources.desired.candidates
        now = asyncio.get_running_loop().time()
        put = [o.change for o in outcomes if isinstance(o.change, PutPeer) and o.error is None]
        if with_endpoint := [change.peer_id for change in put if change.endpoint is not None]:
            self._forget_old_endpoints()  # here too: without a peer that has a choice nobody else does
            for peer_id in with_endpoint:
                self._endpoint_set.pop(peer_id, None)  # or it would stay in its place
                self._endpoint_set[peer_id] = now
        return len(failures)

    def _await_handshakes(self, outcomes: Sequence[Outcome], target: Target, begun: float) -> None:
        """Of what was applied from `begun` on (Unix seconds)."""
        done = [outcome.change for outcome in outcomes if outcome.error is None]
        awaited = awaited_new(done, target)
        key = target.settings.private_key
        # the same key set once more, as after a failure beside it, ends no session
        if key != self._renewed_under and any(isinstance(change, SetDevice) for change in done):
            for change in done:
                if isinstance(change, RenewSessions):
                    awaited |= awaited_anew(change.public_keys, target, begun)
                    self._renewed_under = key
        if awaited:
            self._awaited |= awaited
            self.awaiting.set()

    def _tell(self, outcomes: Sequence[Outcome], target: Target) -> None:
        peers = [outcome.change for outcome in outcomes if outcome.error is None]
        self._remember_when(peers, target)
        if target.firewall is not None and ReplaceFirewall(target.firewall) in peers:
            self.policies_applied_at = self._now()
            log.info("policies applied", policies=len(self._node.desired.policies), rules=target.firewall.rules)
        changed = [change for change in peers if isinstance(change, PutPeer | RemovePeer)]
        if changed:
            # a silent peer gets another endpoint twice a minute
            is_move = all(isinstance(change, PutPeer) and change.fields == ("endpoint",) for change in changed)
            write = log.debug if is_move else log.info
            write(
                "peers changed",
                added=sum(isinstance(change, PutPeer) and change.is_new for change in peers),
                removed=sum(isinstance(change, RemovePeer) for change in peers),
                updated=sum(isinstance(change, PutPeer) and not change.is_new for change in peers),
                peers=len(target.peers),
            )

    def _remember_when(self, changes: Sequence[Change], target: Target) -> None:
        removed = [change.peer_id for change in changes if isinstance(change, RemovePeer)]
        if None in removed:  # a pass does not know them by their ids
            self.since = {peer_id: at for peer_id, at in self.since.items() if peer_id in target.peers}
        for peer_id in removed:
            if peer_id is not None and peer_id not in target.peers:
                self.since.pop(peer_id, None)
        now = self._now()
        self.since |= {change.peer_id: now for change in changes if isinstance(change, PutPeer) and change.is_new}

    def _warn(self, warnings: Sequence[Warned]) -> None:
        """Each thing left out of the target is said once, and again only after it had gone."""
        seen = {(warning.code, warning.subject): warning for warning in warnings}
        for key, warning in seen.items():
            if key not in self._warned:
                log.warning("left out of the mesh", what=warning.code, detail=warning.text)
        self._warned = frozenset(seen)


def _why_down(
    interface: str, due: Sequence[Change], changes: Sequence[Change], outcomes: Sequence[Outcome]
) -> str | None:
    """Why there is no interface after a pass, or none that may carry anything; None when there is one."""
    firewalls = [outcome.error for outcome in outcomes if isinstance(outcome.change, ReplaceFirewall)]
    if len(firewalls) > 1 and firewalls[-1] is not None:  # neither the one that was wanted nor the baseline
        return firewalls[-1]
    if leaves_firewall(due, changes):
        return f"another program keeps changing the firewall: {interface} is down until it may be repaired again"
    for outcome in outcomes:
        if isinstance(outcome.change, CreateLink):
            return outcome.error
    if not changes and any(isinstance(change, CreateLink) for change in due):
        return f"another program keeps deleting {interface}"
    return None


def _first_error(outcomes: Sequence[Outcome]) -> str:
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    return f"{len(errors)} changes, first: {errors[0]}" if errors else ""
