"""Puts together what keeps the kernel equal to the desired state: the resources, the passes, and the loops."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from plexd.config.models import Config
from plexd.converge.endpoint_trials import EndpointTrials
from plexd.converge.handshake_retries import HandshakeRetries
from plexd.converge.handshakes import Handshakes
from plexd.converge.mesh import Interface, Mesh, Table
from plexd.converge.mesh_settings import mesh_interface_name
from plexd.converge.passes import Converger
from plexd.converge.repair import Repair
from plexd.converge.view import View
from plexd.converge.wanted import Wanted
from plexd.converge.watch import Watch
from plexd.linux.kernel import Kernel
from plexd.mesh.drift import Correction
from plexd.mesh.firewall import TABLE
from plexd.mesh.target import Settings
from plexd.node.health import Health
from plexd.node.state import Node
from plexd.runtime.component import Component
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


class Convergence:
    """The mesh, and the converger that has it as its first resource."""

    def __init__(
        self,
        kernel: Kernel,
        config: Config,
        node: Node,
        settings: Callable[[Identity], Settings | None],
        health: Health,
    ) -> None:
        name = mesh_interface_name(config)
        self._kernel = kernel
        self._interface = kernel.interface(name, config.mesh.backend, config.mesh.userspace_program)
        self.mesh = build_mesh(self._interface, kernel.table(TABLE), node, settings, health)
        self._interface.is_wanted = self.mesh.wanted.is_wanted
        self.converger = Converger([self.mesh.resource], health)

    def component(
        self, request_pass: Callable[[str], None], report: Callable[[Sequence[Correction]], None]
    ) -> Component:
        """The loops that repair without the control plane; `report` takes what they corrected."""
        kernel, mesh, converger = self._kernel, self.mesh, self.converger
        pass_is_due = partial(request_pass, "configuration reloaded")
        return Component(
            services=(
                Watch("watch network", kernel.watch),
                Watch("watch firewall", kernel.watch_firewall),
                Repair(kernel, converger, mesh.resource.up, report),
                Handshakes(self._interface, mesh.resource, mesh.retries, converger, request_pass),
            ),
            live=dict.fromkeys(("mesh.mtu", "mesh.persistent_keepalive", "policy"), pass_is_due),
        )
