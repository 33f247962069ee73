"""Builds every service of the node, connects their callbacks, and goes over the components."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from plexd.api.assembly import ApiServer
from plexd.config.in_force import Configuration
from plexd.control import ControlPlane
from plexd.converge.assembly import Convergence
from plexd.converge.drift_reports import DriftReports
from plexd.converge.mesh_settings import mesh_settings
from plexd.converge.reconcile import Reconcile
from plexd.events.dispatch import Dispatch
from plexd.events.listener import Listener
from plexd.events.rejections import Rejections
from plexd.events.state import StateEvents
from plexd.identity.enrolment import TokenSearch
from plexd.identity.recovery import Recovery
from plexd.identity.reenrolment import Reenrolment
from plexd.identity.registration import Registrar
from plexd.identity.rotation import Rotation
from plexd.linux import systemd
from plexd.linux.kernel import Kernel
from plexd.mesh.target import Settings
from plexd.node.capabilities import Capabilities
from plexd.node.control_calls import ControlCalls, SelfDescription
from plexd.node.health import Health
from plexd.node.heartbeat import Heartbeat
from plexd.node.persist import Persist
from plexd.node.state import Node
from plexd.node.status import Membership, Overview
from plexd.runtime.clocks import Clocks
from plexd.runtime.component import Component, contribute
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
class Context:
    """What exists before registration and survives a change of identity. `started_at` is monotonic."""

    configuration: Configuration
    identities: IdentityStore
    snapshots: SnapshotStore
    tokens: TokenSearch
    health: Health
    overview: Overview
    api_server: ApiServer
    groups: Groups
    notifier: systemd.Notifier
    started_at: float


@dataclass(frozen=True, slots=True)
class Deliveries:
    """The control plane client, and the deliveries that run even before registration."""

    control: ControlPlane
    description: SelfDescription
    registrar: Registrar
    telemetry: Telemetry


@dataclass(frozen=True, slots=True)
class Agent:
    """A registered node at work.

    `work` ends first at a stop and pauses while the identity changes; `recovery` changes the identity; `vital` services
    run until the end. At a stop `persist` and `drift`, which are vital too, are asked to save what they hold.
    """

    node: Node
    kernel: Kernel
    work: Sequence[Service]
    recovery: Recovery
    vital: Sequence[Service]
    persist: Persist
    drift: DriftReports


def compose(context: Context, deliveries: Deliveries, node: Node, kernel: Kernel, work: Supervisor) -> Agent:
    """Build the agent. Nothing runs yet when this returns; `work` is what will run the agent's work."""
    configuration, health = context.configuration, context.health
    control, telemetry, agent_audit = deliveries.control, deliveries.telemetry, deliveries.telemetry.trail
    config = configuration.current
    heartbeat_interval = config.heartbeat.interval.total_seconds()
    reconcile_interval = config.reconcile.interval.total_seconds()

    # what the services below need of each other before all of them exist
    def settings(identity: Identity) -> Settings | None:
        return mesh_settings(configuration.current, identity, names.control_plane)

    def reconnect(reason: str) -> None:
        """Pooled connections may be dead: drop them before reconnecting."""
        control.forget_connections()
        listener.reopen(reason)
        heartbeat.request()
        traversal.look_again(reason)

    convergence = Convergence(kernel, config, node, settings, health)
    converger, mesh = convergence.converger, convergence.mesh
    calls = ControlCalls(control, node, health, deliveries.description, mesh.view.status, context.started_at)
    persist = Persist(node, context.snapshots, context.identities)
    drift = DriftReports(calls, node, context.snapshots)
    reconcile = Reconcile(
        calls, converger, node, drift.cycle_ended, persist.save_signing_keys, health, reconcile_interval
    )
    clocks = Clocks()
    traversal = Traversal(
        configuration,
        context.groups,
        node,
        kernel,
        calls,
        mesh.resource,
        converger,
        reconcile.request_pass,
        reconnect,
        clocks.look,
    )
    names = Resolve(node, mesh.wanted.resolved, urlsplit(config.api or "").hostname or "", reconcile.request_pass)
    rotation = Rotation(calls, context.identities, node, converger.apply_event, reconcile.request)
    state_events = StateEvents(
        node, converger.apply_event, reconcile.request, persist.save_signing_keys, persist.save_entries
    )
    dispatch = Dispatch(calls.own, reconcile.request)
    listener = Listener(control, node, Verifier(), dispatch.handle, reconcile.request, health, reconcile_interval)
    heartbeat = Heartbeat(calls.beat, node, heartbeat_interval, reconcile.request, rotation.request)
    reenrolment = Reenrolment(
        node,
        context.identities,
        context.snapshots,
        deliveries.registrar,
        context.tokens,
        work.paused,
        persist.writing,
        converger.converge,
    )
    recovery = Recovery(node, reenrolment, heartbeat.probe, heartbeat_interval)

    context.overview.membership = Membership(node, mesh.view)
    mesh.wanted.on_unresolved = names.names_changed.set
    mesh.resource.on_created = partial(traversal.look_again, "interface created")
    clocks.on_gap.append(lambda _: mesh.trials.restart(asyncio.get_running_loop().time()))
    clocks.on_gap += [reconnect, reconcile.request]
    rotation.on_rotated.append(heartbeat.request)
    rotation.on_accepted.append(agent_audit.mesh_key_rotated)
    listener.on_reconnected.append(partial(traversal.look_again, "stream connected again"))
    listener.on_rejected.append(agent_audit.event_rejected)
    persist.on_new_signing_key.append(agent_audit.signing_key_rotated)
    context.api_server.on_secret_read.append(lambda read: agent_audit.secret_read(*read))

    def change_intervals() -> None:
        now = configuration.current
        heartbeat.interval = recovery.interval = now.heartbeat.interval.total_seconds()
        reconcile.interval = listener.poll_interval = now.reconcile.interval.total_seconds()
        reconcile.request("configuration reloaded")  # ends a wait of the former length

    core = Component(
        services=(reconcile, listener, names, Capabilities(calls, node), clocks, Garbage()),
        live=dict.fromkeys(("heartbeat", "reconcile"), change_intervals),
    )
    components = (
        core,
        state_events.component(),
        Rejections(calls, node).component(),
        convergence.component(reconcile.request_pass, drift.cycle_ended),
        rotation.component(),
        traversal.component(),
        context.api_server.component(node, calls, reconcile.request),
        telemetry.component(node, mesh.view),
    )
    for component in components:
        contribute(configuration.live, component.live)
        dispatch.add(component.events)
        listener.on_connected += component.stream_connected
        contribute(context.overview.members, component.status)
        contribute(calls.heartbeat, component.heartbeat)
        contribute(calls.capabilities, component.capabilities)

    vital: list[Service] = [heartbeat, persist, drift]
    if (watchdog_seconds := systemd.watchdog_interval()) is not None:
        vital.append(Watchdog(watchdog_seconds / 3, lambda: context.notifier.send("WATCHDOG=1")))
    return Agent(
        node,
        kernel,
        work=[service for component in components for service in component.services],
        recovery=recovery,
        vital=vital,
        persist=persist,
        drift=drift,
    )
