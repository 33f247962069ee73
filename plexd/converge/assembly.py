"""Puts together what converges the mesh."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from plexd.converge.endpoint_trials import EndpointTrials
from plexd.converge.handshake_retries import HandshakeRetries
from plexd.converge.mesh import Interface, Mesh, Table
from plexd.converge.view import View
from plexd.converge.wanted import Wanted
from plexd.mesh.target import Settings
from plexd.node.health import Health
from plexd.node.state import Node
from plexd.store.identity import Identity


@dataclass(frozen=True, slots=True)
class MeshParts:
    """`resource` is what a pass converges; the other parts are what it remembers, and the view of it."""

    resource: Mesh
    wanted: Wanted
    trials: EndpointTrials
    retries: HandshakeRetries
    view: View


def build_mesh(
    interface: Interface,
    table: Table,
    node: Node,
    settings: Callable[[Identity], Settings | None],
    health: Health,
    now: Callable[[], float] = time.time,
) -> MeshParts:
    """`settings` turns an identity into what this node brings along, None while the node has no private key."""
    trials, retries = EndpointTrials(), HandshakeRetries()
    wanted = Wanted(node, settings, trials)
    mesh = Mesh(interface, table, wanted, trials, retries, health, now)
    return MeshParts(mesh, wanted, trials, retries, View(interface, table, wanted, mesh.applied, now))
