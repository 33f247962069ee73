"""Which services make a node, and who tells whom: each is built here, and handed the little it asks for."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from plexd.api.assembly import ApiServer
from plexd.config.in_force import Configuration
from plexd.control import ControlPlane
from plexd.converge.assembly import build_mesh
from plexd.converge.drift_reports import DriftReports
from plexd.converge.handshakes import Handshakes
from plexd.converge.mesh_settings import mesh_interface_name, mesh_settings
from plexd.converge.passes import Converger
from plexd.converge.reconcile import Reconcile
from plexd.converge.repair import Repair
from plexd.converge.watch import Watch
from plexd.events.effects import Effects
from plexd.events.listener import Listener
from plexd.events.rejections import Rejections
from plexd.identity.enrolment import TokenSearch
from plexd.identity.recovery import Recovery
from plexd.identity.reenrolment import Reenrolment
from plexd.identity.registration import Registrar
from plexd.identity.rotation import Rotation
from plexd.linux import systemd
from plexd.linux.kernel import Kernel
from plexd.mesh.nat import Finding
from plexd.mesh.target import Settings
from plexd.node.capabilities import Capabilities
from plexd.node.control_calls import ControlCalls, SelfDescription
from plexd.node.health import Health
from plexd.node.heartbeat import Heartbeat
from plexd.node.persist import Persist
from plexd.node.state import Node
from plexd.node.status import Membership, Overview
from plexd.runtime.clocks import Clocks
from plexd.runtime.garbage import Garbage
from plexd.runtime.supervisor import Groups, Service, Supervisor
from plexd.runtime.watchdog import Watchdog
from plexd.store.identity import Identity, IdentityStore
from plexd.store.snapshot import SnapshotStore
from plexd.telemetry.assembly import Telemetry
from plexd.traversal.assembly import Traversal
from plexd.traversal.name_resolution import Resolve
from plexd.wire.envelope import Verifier


@dataclass(frozen=True, slots=True)
class Ground:
    """What is there before the node is registered, and stays whichever node it becomes.

    `started_at` is monotonic.
    """

    configuration: Configuration
    identities: IdentityStore
    snapshots: SnapshotStore
    tokens: TokenSearch
    health: Health
    overview: Overview
    front: ApiServer
    groups: Groups
    notifier: systemd.Notifier
    started_at: float


@dataclass(frozen=True, slots=True)
class Upstream:
    """The control plane, and what is owed to it whether or not the node is registered yet."""

    control: ControlPlane
    description: SelfDescription
    registrar: Registrar
    telemetry: Telemetry


@dataclass(frozen=True, slots=True)
class Agent:
    """A node at work.

    `work` ends first at a stop, and pauses while the identity changes; `recovery` is what changes it; `vital` goes on
    until the end. `persist` and `drift`, which are among those, are asked to save what they hold.
    """

    node: Node
    kernel: Kernel
    work: list[Service]
    recovery: Recovery
    vital: list[Service]
    persist: Persist
    drift: DriftReports


def compose(ground: Ground, upstream: Upstream, node: Node, kernel: Kernel, work: Supervisor) -> Agent:
    """Nothing runs yet when this returns; `work` is what will run the agent's work."""
    configuration, health, front = ground.configuration, ground.health, ground.front
    control, telemetry, trail = upstream.control, upstream.telemetry, upstream.telemetry.trail
    config = configuration.current
    beat_interval, interval = config.heartbeat.interval.total_seconds(), config.reconcile.interval.total_seconds()

    # what the following need of each other before all of them are there
    def settings(identity: Identity) -> Settings | None:
        return mesh_settings(configuration.current, identity, resolve.control_plane)

    def finding() -> Finding | None:
        return traversal.finding

    def reach_out_anew(reason: str) -> None:
        """Connections may lead nowhere without a sign of it: those kept for calls go before anybody asks for one."""
        control.forget_connections()
        listener.reopen(reason)
        heartbeat.request()
        traversal.look_again(reason)

    interface = kernel.interface(mesh_interface_name(config), config.mesh.backend, config.mesh.userspace_program)
    mesh = build_mesh(interface, kernel.table(), node, settings, health)
    interface.is_wanted = mesh.wanted.is_wanted
    converger = Converger([mesh.resource], health)
    uplink = ControlCalls(control, node, health, upstream.description, mesh.view.status, finding, ground.started_at)
    persist = Persist(node, ground.snapshots, ground.identities)
    drift = DriftReports(uplink, node, ground.snapshots)
    reconcile = Reconcile(uplink, converger, node, drift.cycle_ended, persist.save_signing_keys, health, interval)
    clocks = Clocks()
    traversal = Traversal(
        configuration,
        ground.groups,
        node,
        kernel,
        uplink,
        mesh.resource,
        converger,
        reconcile.request_pass,
        reach_out_anew,
        clocks.look,
    )
    resolve = Resolve(node, mesh.wanted.resolved, urlsplit(config.api or "").hostname or "", reconcile.request_pass)
    rotation = Rotation(uplink, ground.identities, node, converger.apply_event, reconcile.request)
    refusals = Rejections(uplink, node)
    effects = Effects(
        node,
        uplink.own,
        converger.apply_event,
        reconcile.request,
        rotation.request,
        refusals.refuse_action,
        refusals.refuse_session,
        persist.save_signing_keys,
        persist.save_entries,
    )
    listener = Listener(control, node, Verifier(), effects.handle, reconcile.request, health, interval)
    heartbeat = Heartbeat(uplink.beat, node, beat_interval, reconcile.request, rotation.request)
    renewal = Reenrolment(
        node,
        ground.identities,
        ground.snapshots,
        upstream.registrar,
        ground.tokens,
        work.paused,
        persist.writing,
        converger.converge,
    )
    recovery = Recovery(node, renewal, heartbeat.probe, beat_interval)

    ground.overview.membership = Membership(node, mesh.view, finding)
    mesh.wanted.on_unresolved = resolve.names_changed.set
    mesh.resource.on_created = partial(traversal.look_again, "interface created")
    clocks.on_gap.append(lambda _: mesh.trials.restart(asyncio.get_running_loop().time()))
    clocks.on_gap += [reach_out_anew, reconcile.request]
    rotation.on_rotated.append(heartbeat.request)
    listener.on_reconnected.append(partial(traversal.look_again, "stream connected again"))
    listener.on_connected.append(telemetry.wake)
    rotation.on_accepted.append(trail.mesh_key_rotated)
    persist.on_new_signing_key.append(trail.signing_key_rotated)
    listener.on_rejected.append(trail.event_rejected)
    front.on_secret_read.append(lambda read: trail.secret_read(*read))

    def pace() -> None:
        now = configuration.current
        heartbeat.interval = recovery.interval = now.heartbeat.interval.total_seconds()
        reconcile.interval = listener.poll_interval = now.reconcile.interval.total_seconds()
        reconcile.request("configuration reloaded")  # also ends a wait of the old length

    configuration.live.update(dict.fromkeys(("heartbeat", "reconcile"), pace))
    pass_is_due = partial(reconcile.request_pass, "configuration reloaded")
    configuration.live.update(dict.fromkeys(("mesh.mtu", "mesh.persistent_keepalive", "policy"), pass_is_due))
    configuration.live["nat_traversal"] = traversal.services.exchange
    configuration.live["observe"] = lambda: telemetry.renew("metrics", configuration.current)
    configuration.live["audit"] = lambda: telemetry.renew("audit", configuration.current)
    configuration.live["logs"] = lambda: telemetry.renew("logs", configuration.current)

    vital: list[Service] = [heartbeat, persist, drift]
    if (watchdog_seconds := systemd.watchdog_interval()) is not None:
        vital.append(Watchdog(watchdog_seconds / 3, lambda: ground.notifier.send("WATCHDOG=1")))
    return Agent(
        node,
        kernel,
        work=[
            reconcile,
            listener,
            resolve,
            rotation,
            refusals,
            Capabilities(uplink, node),
            Watch("watch network", kernel.watch),
            Watch("watch firewall", kernel.watch_firewall),
            Repair(kernel, converger, mesh.resource.up, drift.cycle_ended),
            Handshakes(interface, mesh.resource, mesh.retries, converger, reconcile.request_pass),
            clocks,
            *front.join(node, uplink, listener.on_connected, reconcile.request),
            Garbage(),
            traversal.services,
            *telemetry.join(node, mesh.view),
        ],
        recovery=recovery,
        vital=vital,
        persist=persist,
        drift=drift,
    )
