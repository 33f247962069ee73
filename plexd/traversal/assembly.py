"""Puts together the services of NAT traversal, as the configuration in force wants them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from plexd.config.in_force import Configuration
from plexd.converge.mesh import Mesh
from plexd.converge.passes import Converger
from plexd.linux.kernel import Kernel
from plexd.linux.lookup import look_up
from plexd.linux.stun import StunClient
from plexd.mesh.nat import Finding
from plexd.node.control_calls import ControlCalls
from plexd.node.state import Node
from plexd.runtime.supervisor import Exchangeable, Groups, Service
from plexd.traversal.candidates import Fallback
from plexd.traversal.endpoint_report import Discovery, EndpointReport, stated
from plexd.traversal.host_addresses import HostAddresses


class Traversal:
    """`services` is to be run, and exchanged when `nat_traversal` changes."""

    def __init__(
        self,
        configuration: Configuration,
        groups: Groups,
        node: Node,
        kernel: Kernel,
        uplink: ControlCalls,
        mesh: Mesh,
        converger: Converger,
        request_pass: Callable[[str], None],
        on_readdressed: Callable[[str], None],
        look_at_clocks: Callable[[], None],
    ) -> None:
        self.services = Exchangeable("nat traversal", self._start)
        self._configuration = configuration
        self._groups = groups
        self._node = node
        self._kernel = kernel
        self._uplink = uplink
        self._mesh = mesh
        self._converger = converger
        self._request_pass = request_pass
        self._on_readdressed = on_readdressed
        self._look_at_clocks = look_at_clocks
        self._report: EndpointReport | None = None
        self._stated = ""

    @property
    def finding(self) -> Finding | None:
        """Where peers reach this node, as far as that is known."""
        return self._report.finding if self._report is not None else None

    def look_again(self, reason: str) -> None:
        if self._report is not None:
            self._report.request(reason)

    def _start(self) -> asyncio.Task[None]:
        self._report = self._make_report()
        services: list[Service] = []
        if self._report is not None:
            services += [self._report, HostAddresses(self._kernel, self._on_readdressed)]
        if self._configuration.current.nat_traversal.fallback == "relay":
            try_next = partial(self._converger.step, self._mesh, self._mesh.look_at_endpoints, "endpoints not changed")
            services.append(Fallback(try_next, self._look_at_clocks))
        return self._groups.start("nat traversal", services)

    def _make_report(self) -> EndpointReport | None:
        nat, port = self._configuration.current.nat_traversal, self._configuration.current.mesh.listen_port
        was_stated, self._stated = self._stated, nat.public_endpoint
        if not nat.enabled:
            return None
        known = None if was_stated else self.finding  # holds until a look finds another
        if nat.public_endpoint:
            discover, known = stated(nat.public_endpoint)
        else:
            stun, timeout = StunClient(port), nat.timeout.total_seconds()
            discover = Discovery(stun, look_up, self._kernel.local_addresses, nat.stun_servers, port, timeout).discover
        return EndpointReport(
            self._uplink,
            self._node,
            self._mesh.up,
            self._converger.apply_event,
            self._request_pass,
            discover,
            known,
            nat.refresh_interval.total_seconds(),
        )
