"""Discovers the public endpoint of this node, reports it, and takes the endpoints of peers from the answer.

The public endpoint comes from STUN servers or from `nat_traversal.public_endpoint`. The loop runs while the mesh is up,
and no failure ends it (docs/contract/mesh.md §8.1).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from plexd.errors import ControlError, KernelError, NotPermitted, StunError, Unresolved, WireError
from plexd.log import get_logger
from plexd.mesh.address import Endpoint, HostPort, parse_endpoint
from plexd.mesh.events import EndpointOffered
from plexd.mesh.nat import Finding, NatType, StunAnswer, classify, is_settled, refusal
from plexd.node.state import Node
from plexd.runtime.backoff import Backoff, Postponement
from plexd.runtime.waiting import set_within, unless_set

log = get_logger("nat")

FIRST_RETRY_SECONDS = 5.0
GRACE_SECONDS = 1.0  # for the answer to a report once another discovery is wanted
MIN_SPACING_SECONDS = 1.0  # between two discoveries


class ControlPlane(Protocol):
    async def report_endpoint(self, public_endpoint: str, nat_type: str) -> Sequence[EndpointOffered]:
        """Raises ControlError or WireError."""


class Stun(Protocol):
    async def ask(self, server: Endpoint, timeout: float) -> Endpoint:
        """The address the server sees; `timeout` in seconds. Raises StunError, or NotPermitted."""


class Discovery:
    """Asks STUN servers, `host:port` each, from the WireGuard port."""

    def __init__(
        self,
        stun: Stun,
        look_up: Callable[[str], Awaitable[Sequence[bytes]]],
        local_addresses: Callable[[], Awaitable[frozenset[bytes]]],
        servers: Sequence[str],
        listen_port: int,
        timeout: float,
    ) -> None:
        """`look_up` raises Unresolved, `local_addresses` KernelError; `timeout` is in seconds, for each server."""
        self._stun = stun
        self._look_up = look_up
        self._local_addresses = local_addresses
        self._servers = servers
        self._listen_port = listen_port
        self._timeout = timeout

    async def discover(self) -> Finding:
        """IPv6 is asked for only when no server answers over IPv4.

        Raises StunError when none is usable, NotPermitted without the capability, KernelError.
        """
        local = await self._local_addresses()
        known: dict[str, tuple[Endpoint, ...]] = {}
        failures: list[str] = []
        for address_size in (4, 16):
            answers: list[StunAnswer] = []
            for server in self._servers:
                if server not in known:
                    known[server] = await self._addresses(server, failures)
                for address in known[server]:
                    told = any(answer.server.packed == address.packed for answer in answers)
                    if len(address.packed) == address_size and not told:
                        answers += await self._ask(server, address, failures)
                if is_settled(answers, local, self._listen_port):
                    break
            if answers:
                return classify(answers, local, self._listen_port)
        raise StunError("; ".join(failures))

    async def _addresses(self, server: str, failures: list[str]) -> tuple[Endpoint, ...]:
        """The first address of each family."""
        parsed = parse_endpoint(server)
        if not isinstance(parsed, HostPort):
            return (parsed,)
        try:
            found = await self._look_up(parsed.host)
        except Unresolved as exc:
            failures.append(str(exc))
            return ()
        first = {len(packed): Endpoint(packed, parsed.port) for packed in reversed(found)}
        return tuple(first.values())

    async def _ask(self, server: str, address: Endpoint, failures: list[str]) -> tuple[StunAnswer, ...]:
        """One answer or none."""
        try:
            answer = StunAnswer(address, await self._stun.ask(address, self._timeout))
            reason = refusal(answer)
        except StunError as exc:
            reason = str(exc)
        if reason is not None:
            log.debug("server not usable", server=server, address=str(address), reason=reason)
            failures.append(f"{server}: {reason}")
            return ()
        log.debug("server answered", server=server, address=str(address), mapped=str(answer.mapped))
        return (answer,)


def stated(public_endpoint: str) -> tuple[Callable[[], Awaitable[Finding]], Finding]:
    """The discovery, and its finding, of a configured endpoint, which is not checked.

    Raises ValueError when it is not `ip:port`.
    """
    endpoint = parse_endpoint(public_endpoint)
    if isinstance(endpoint, HostPort):
        raise ValueError("a name is no public endpoint")  # noqa: TRY004 - it is the text that is wrong
    finding = Finding(endpoint, NatType.NONE)

    async def discover() -> Finding:
        return finding

    return discover, finding


class EndpointReport:
    """`discover` raises StunError, NotPermitted or KernelError. `apply_event` brings folded endpoints into the kernel;
    when it fails, `request_pass` is called.

    `refresh_interval` is in seconds, spread by 10 %. The argument `finding` is what was known before. The attribute is
    the last finding, also while later discoveries fail.
    """

    name = "endpoint"

    def __init__(
        self,
        control: ControlPlane,
        node: Node,
        mesh_up: asyncio.Event,
        apply_event: Callable[[], Awaitable[bool]],
        request_pass: Callable[[str], None],
        discover: Callable[[], Awaitable[Finding]],
        finding: Finding | None,
        refresh_interval: float,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.finding = finding
        self._control = control
        self._node = node
        self._mesh_up = mesh_up
        self._apply_event = apply_event
        self._request_pass = request_pass
        self._discover = discover
        self._refresh_interval = refresh_interval
        self._uniform = uniform
        self._wanted = asyncio.Event()
        self._retry = Backoff(FIRST_RETRY_SECONDS, refresh_interval, uniform)
        self._undiscovered = self._unreported = 0  # failures in a row
        self._forbidden = False
        self._postponement = Postponement(lambda: node.identity.node_id, uniform)

    def request(self, reason: str) -> None:
        """Discover again at once, because the public endpoint may have changed."""
        log.debug("discovery requested", reason=reason)
        self._wanted.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._mesh_up.wait()
            await self._node.accepted.wait()
            self._wanted.clear()
            started = loop.time()
            delay = await self._once()
            await set_within(self._wanted, delay)
            await asyncio.sleep(max(0.0, started + MIN_SPACING_SECONDS - loop.time()))

    async def _once(self) -> float:
        """Discover and report; the seconds until the next time."""
        try:
            finding = await self._discover()
        except NotPermitted as exc:
            if not self._forbidden:
                log.error("endpoint cannot be discovered", error=str(exc), next_step="peers learn it from our packets")
            self._forbidden = True
            return self._retry.next()
        except (StunError, KernelError) as exc:
            self._undiscovered += 1
            if self._undiscovered == 1 or self._undiscovered % 10 == 0:
                log.warning("endpoint not discovered", error=str(exc), failures=self._undiscovered)
            return self._retry.next()
        self._undiscovered, self._forbidden = 0, False
        self._retry.reset()
        if finding != self.finding:
            was = f"{self.finding.public_endpoint} {self.finding.type}" if self.finding is not None else ""
            log.info("endpoint found", endpoint=str(finding.public_endpoint), nat_type=finding.type.value, was=was)
            self.finding = finding
        await self._take(await self._report_unless_moot(finding))
        return self._refresh_interval * self._uniform(0.9, 1.1)

    async def _report_unless_moot(self, finding: Finding) -> Sequence[EndpointOffered]:
        """The endpoints of peers from the answer, none without an answer.

        When another discovery is wanted, the answer may never come: the host may have lost the address it is sent to.
        """
        moot = asyncio.Event()

        async def judge() -> None:
            await self._wanted.wait()
            await asyncio.sleep(GRACE_SECONDS)
            moot.set()

        judging = asyncio.create_task(judge(), name="is the report moot")
        try:
            return await unless_set(moot, self._report(finding)) or ()
        finally:
            judging.cancel()

    async def _report(self, finding: Finding) -> Sequence[EndpointOffered]:
        loop = asyncio.get_running_loop()
        node_id = self._node.identity.node_id
        if self._postponement.remaining(loop.time()):
            return ()
        try:
            offers = await self._control.report_endpoint(str(finding.public_endpoint), finding.type.value)
        except (ControlError, WireError) as exc:
            self._unreported += 1
            if self._unreported == 1 or self._unreported % 10 == 0:
                log.warning("endpoint report failed", error=str(exc), failures=self._unreported)
            if isinstance(exc, ControlError):
                self._postponement.postpone(exc, node_id, loop.time())
            return ()
        self._unreported = 0
        return offers

    async def _take(self, offers: Sequence[EndpointOffered]) -> None:
        changed = [offer.peer_id for offer in offers if self._node.fold(offer)]
        if not changed:
            return
        log.info("peer endpoints received", peers=len(changed))
        is_applied = False
        try:
            is_applied = await self._apply_event()
        finally:
            if not is_applied:  # the next answer will bring nothing new
                self._request_pass("peer endpoints not applied")
