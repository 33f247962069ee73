"""Puts together the services of NAT traversal, as the configuration in force wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from plexd.runtime.component import Component
from plexd.runtime.exchange import Exchangeable
from plexd.runtime.supervisor import Groups, Service
from plexd.traversal.candidates import Fallback
from plexd.traversal.endpoint_report import Discovery, EndpointReport, stated
from plexd.traversal.host_addresses import HostAddresses


class Traversal:
    def __init__(
        self,
        configuration: Configuration,
        groups: Groups,
        node: Node,
        kernel: Kernel,
        control_calls: ControlCalls,
        mesh: Mesh,
        converger: Converger,
        request_pass: Callable[[str], None],
        on_readdressed: Callable[[str], None],
        look_at_clocks: Callable[[], None],
    ) -> None:
        self._configuration = configuration
        self._groups = groups
        self._node = node
        self._kernel = kernel
        self._control_calls = control_calls
        self._mesh = mesh
        self._converger = converger
        self._request_pass = request_pass
        self._on_readdressed = on_readdressed
        self._look_at_clocks = look_at_clocks
        self._report: EndpointReport | None = None
        self._stated = ""
        self._services = Exchangeable("nat traversal", self._build, self._run)

    @property
    def finding(self) -> Finding | None:
        """Where peers reach this node, as far as that is known."""
        return self._report.finding if self._report is not None else None

    def look_again(self, reason: str) -> None:
        if self._report is not None:
            self._report.request(reason)

    def component(self) -> Component:
        return Component(
            services=(self._services,),
            live={"nat_traversal": self._services.exchange},
            status={"nat": self._describe},
            heartbeat={"nat": self._describe},
        )

    def _describe(self) -> dict[str, str] | None:
        found = self.finding
        return {"public_endpoint": str(found.public_endpoint), "type": found.type.value} if found is not None else None

    async def _run(self, services: Sequence[Service]) -> None:
        await self._groups.supervisor("nat traversal").run(services)

    def _build(self) -> Sequence[Service] | None:
        self._report = self._make_report()
        services: list[Service] = []
        if self._report is not None:
            services += [self._report, HostAddresses(self._kernel, self._on_readdressed)]
        if self._configuration.current.nat_traversal.fallback == "relay":
            try_next = partial(self._converger.step, self._mesh, self._mesh.look_at_endpoints, "endpoints not changed")
            services.append(Fallback(try_next, self._look_at_clocks))
        return services or None

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
            self._control_calls,
            self._node,
            self._mesh.up,
            self._converger.apply_event,
            self._request_pass,
            discover,
            known,
            nat.refresh_interval.total_seconds(),
        )
