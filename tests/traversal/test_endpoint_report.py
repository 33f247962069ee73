"""Discovery and report over hours of virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
from structlog.testing import capture_logs

from plexd.errors import ControlError, KernelError, NotPermitted, RateLimited, StunError, Transient, Unresolved
from plexd.mesh.address import Endpoint, parse_endpoint, parse_ip
from plexd.mesh.desired import EndpointSource
from plexd.mesh.events import EndpointOffered
from plexd.mesh.nat import Finding, NatType
from plexd.traversal.endpoint_report import Discovery, EndpointReport, stated
from tests.node_harness import Asked, highest, lowest, make_node, middle, peer
from tests.virtual_time import run_virtual

pytestmark = pytest.mark.virtual_time

R = EndpointSource.REPORT
PORT = 51820
LOCAL = frozenset({parse_ip("198.51.100.7")})


def endpoint(text: str) -> Endpoint:
    parsed = parse_endpoint(text)
    assert isinstance(parsed, Endpoint)
    return parsed


ONE = Finding(endpoint("198.51.100.9:40000"), NatType.FULL_CONE)
OTHER = Finding(endpoint("198.51.100.9:45000"), NatType.SYMMETRIC)


class Look:
    """Discoveries of which each takes 100 ms and ends as the script says; its last entry goes on for ever."""

    def __init__(self, *script: Finding | Exception) -> None:
        self._script = list(script)
        self.times: list[float] = []

    async def discover(self) -> Finding:
        self.times.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.1)
        result = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        if isinstance(result, Exception):
            raise result
        return result


@dataclass
class Plane:
    """Notes reports, and answers with what is next; its last answer goes on for ever."""

    answers: list[Sequence[EndpointOffered] | ControlError] = field(default_factory=lambda: [()])
    reports: list[tuple[float, str, str]] = field(default_factory=list)

    async def report_endpoint(self, public_endpoint: str, nat_type: str) -> Sequence[EndpointOffered]:
        self.reports.append((round(asyncio.get_running_loop().time(), 3), public_endpoint, nat_type))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, ControlError):
            raise answer
        return answer

    @property
    def times(self) -> list[float]:
        return [at for at, _, _ in self.reports]


class Stage:
    def __init__(
        self, look: Look, plane: Plane | None = None, uniform: Callable[[float, float], float] = middle
    ) -> None:
        self.look = look
        self.plane = plane or Plane()
        self.node = make_node(peer(2), peer(3, endpoint="192.0.2.3:51820"))
        self.mesh_up = asyncio.Event()
        self.mesh_up.set()
        self.applied = 0
        self.apply_seconds = 0.0
        self.applies = True
        self.passes = Asked()
        self.service = EndpointReport(
            self.plane, self.node, self.mesh_up, self._apply, self.passes, look.discover, None, 60.0, uniform
        )

    async def _apply(self) -> bool:
        await asyncio.sleep(self.apply_seconds)
        self.applied += self.applies
        return self.applies

    async def run(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.service.run()


def gaps(times: list[float]) -> list[float]:
    return [round(after - before, 1) for before, after in itertools.pairwise(times)]


@pytest.mark.parametrize(("uniform", "expected"), [(lowest, 54.0), (highest, 66.0)])
async def test_every_discovery_is_reported_at_the_refresh_interval_spread_by_a_tenth(
    uniform: Callable[[float, float], float], expected: float
) -> None:
    stage = Stage(Look(ONE), uniform=uniform)
    await stage.run(200)
    assert set(gaps(stage.plane.times)) == {expected + 0.1}
    assert {report[1:] for report in stage.plane.reports} == {("198.51.100.9:40000", "full_cone")}


def test_failed_discovery_is_repeated_after_5_seconds_doubling_up_to_the_refresh_interval() -> None:
    async def main() -> Stage:
        stage = Stage(Look(ONE, *[StunError("nobody answers")] * 12, OTHER, StunError("again"), ONE))
        await stage.run(1000)
        return stage

    with capture_logs() as lines:
        stage = run_virtual(main())
    waits = [round(gap - 0.1, 1) for gap in gaps(stage.look.times)]
    assert waits[:15] == [60, 5, 10, 20, 40, *[60] * 9, 5]
    warnings = [line for line in lines if line["event"] == "endpoint not discovered"]
    assert [line["failures"] for line in warnings] == [1, 10, 1]
    assert {line["log_level"] for line in warnings} == {"warning"}
    found = [(line["endpoint"], line["was"]) for line in lines if line["event"] == "endpoint found"]
    assert found == [
        ("198.51.100.9:40000", ""),
        ("198.51.100.9:45000", "198.51.100.9:40000 full_cone"),
        ("198.51.100.9:40000", "198.51.100.9:45000 symmetric"),
    ]


async def test_last_finding_is_kept_while_discovery_fails() -> None:
    stage = Stage(Look(ONE, StunError("nobody answers")))
    before = stage.service.finding
    assert before is None
    await stage.run(500)
    assert stage.service.finding == ONE
    assert len(stage.plane.reports) == 1


def test_missing_capability_is_one_error_and_no_report() -> None:
    async def main() -> Stage:
        stage = Stage(Look(NotPermitted("grant CAP_NET_RAW")))
        await stage.run(3600)
        return stage

    with capture_logs() as lines:
        stage = run_virtual(main())
    assert [line["log_level"] for line in lines if line["component"] == "nat"] == ["error"]
    assert (stage.plane.reports, stage.service.finding) == ([], None)


async def test_kernel_that_refuses_counts_as_a_failure() -> None:
    stage = Stage(Look(KernelError("no answer"), ONE))
    await stage.run(10)
    assert stage.plane.times == [5.2]


def test_failed_report_is_repeated_in_the_next_cycle() -> None:
    async def main() -> Stage:
        stage = Stage(Look(ONE), Plane([Transient("503"), Transient("503"), ()]))
        await stage.run(150)
        return stage

    with capture_logs() as lines:
        stage = run_virtual(main())
    assert stage.plane.times == [0.1, 60.2, 120.3]
    assert [line["log_level"] for line in lines if line["event"] == "endpoint report failed"] == ["warning"]


async def test_answer_becomes_candidates_of_known_peers_and_nothing_else_changes() -> None:
    offers = [EndpointOffered("n_2", "203.0.113.9:41000", R), EndpointOffered("n_9", "203.0.113.9:41001", R)]
    stage = Stage(Look(ONE), Plane([offers]))
    await stage.run(150)
    desired = stage.node.desired
    assert desired.candidates["n_2"].offers == ((R, "203.0.113.9:41000"),)
    assert "n_9" not in desired.candidates
    assert desired.peers == make_node(peer(2), peer(3, endpoint="192.0.2.3:51820")).desired.peers
    assert stage.applied == 1  # the second and third answer say nothing new


async def test_look_that_is_wanted_does_not_keep_the_answer_from_being_applied() -> None:
    """As when a pass is under way, which has the kernel to itself."""
    stage = Stage(Look(ONE), Plane([[EndpointOffered("n_2", "203.0.113.9:41000", R)]]))
    stage.apply_seconds = 5
    asyncio.get_running_loop().call_later(2, stage.service.request, "stream connected again")
    await stage.run(20)
    assert (stage.applied, stage.passes.calls) == (1, [])
    assert stage.look.times == [0.0, 5.1]


@pytest.mark.parametrize("how", ["refused", "ended"])
async def test_answer_that_could_not_be_applied_earns_a_pass(how: str) -> None:
    stage = Stage(Look(ONE), Plane([[EndpointOffered("n_2", "203.0.113.9:41000", R)]]))
    stage.apply_seconds = 5
    stage.applies = how == "ended"
    await stage.run(3 if how == "ended" else 20)
    assert (stage.applied, stage.passes.reasons) == (0, ["peer endpoints not applied"])


@pytest.mark.parametrize("mesh_first", [True, False])
async def test_discovery_waits_for_the_mesh_and_for_the_identity(mesh_first: bool) -> None:
    stage = Stage(Look(ONE))
    stage.mesh_up.clear()
    stage.node.refuse()
    running = asyncio.create_task(stage.run(100))
    accept = partial(stage.node.accept, stage.node.credential())
    for ready in (stage.mesh_up.set, accept) if mesh_first else (accept, stage.mesh_up.set):
        await asyncio.sleep(10)
        ready()
    await running
    assert stage.plane.times == [20.1, 80.2]


async def test_request_is_answered_at_once_and_a_storm_of_them_once_a_second() -> None:
    stage = Stage(Look(ONE))
    running = asyncio.create_task(stage.run(40))
    await asyncio.sleep(20)
    stage.service.request("stream connected again")
    await asyncio.sleep(10)
    for _ in range(20):
        stage.service.request("stream connected again")
        await asyncio.sleep(0.1)
    await running
    assert [round(at, 1) for at in stage.look.times] == [0.0, 20.0, 30.0, 31.0, 32.0]


async def test_request_during_a_discovery_earns_another() -> None:
    stage = Stage(Look(ONE))
    running = asyncio.create_task(stage.run(10))
    await asyncio.sleep(0.05)
    stage.service.request("interface created")
    await running
    assert [round(at, 1) for at in stage.look.times] == [0.0, 1.0]


async def test_report_whose_answer_does_not_come_holds_up_no_look_that_is_wanted() -> None:
    """As when the host's address went away between the request and its answer."""

    class Lost(Plane):
        async def report_endpoint(self, public_endpoint: str, nat_type: str) -> Sequence[EndpointOffered]:
            offers = await super().report_endpoint(public_endpoint, nat_type)
            if len(self.reports) == 1:
                await asyncio.sleep(30)
            return offers

    stage = Stage(Look(ONE, OTHER), Lost())
    asyncio.get_running_loop().call_later(2, stage.service.request, "host addresses changed")
    await stage.run(10)
    assert [(at, public) for at, public, _ in stage.plane.reports] == [
        (0.1, str(ONE.public_endpoint)),
        (3.1, str(OTHER.public_endpoint)),
    ]


def test_configured_endpoint_is_taken_at_its_word() -> None:
    discover, finding = stated("[2001:db8::7]:51820")
    assert finding == Finding(endpoint("[2001:db8::7]:51820"), NatType.NONE)
    assert asyncio.run(_result(discover)) == finding


async def _result(discover: Callable[[], Awaitable[Finding]]) -> Finding:
    return await discover()


# one discovery


@dataclass
class Servers:
    """STUN servers by address: what they see, or how they fail. Names resolve by `names`."""

    seen: dict[str, str | Exception]
    names: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    looked_up: list[str] = field(default_factory=list)

    async def ask(self, server: Endpoint, timeout: float) -> Endpoint:
        assert timeout == 5.0
        self.asked.append(str(server))
        answer = self.seen.get(str(server), StunError("no answer within 5 s"))
        if isinstance(answer, Exception):
            raise answer
        return endpoint(answer)

    async def look_up(self, name: str) -> list[bytes]:
        self.looked_up.append(name)
        if name not in self.names:
            raise Unresolved(f"{name} does not resolve")
        return [parse_ip(text) for text in self.names[name]]

    def discover(self, *servers: str) -> Finding:
        async def local() -> frozenset[bytes]:
            return LOCAL

        return asyncio.run(Discovery(self, self.look_up, local, servers, PORT, 5.0).discover())


A, B, C = "203.0.113.1:3478", "203.0.113.2:3478", "203.0.113.3:3478"
A6, B6 = "[2001:db8::1]:3478", "[2001:db8::2]:3478"
MAPPED, MAPPED6 = "198.51.100.9:40000", "[2001:db8::9]:40000"


def test_servers_are_asked_in_order_until_two_have_answered() -> None:
    servers = Servers({A: MAPPED, B: MAPPED, C: MAPPED})
    assert servers.discover(A, B, C) == Finding(endpoint(MAPPED), NatType.FULL_CONE)
    assert servers.asked == [A, B]


def test_server_that_fails_is_replaced_by_the_next() -> None:
    servers = Servers({B: MAPPED, C: "198.51.100.9:40001"})
    assert servers.discover(A, B, C) == Finding(endpoint(MAPPED), NatType.SYMMETRIC)
    assert servers.asked == [A, B, C]


def test_own_address_needs_no_second_opinion() -> None:
    servers = Servers({A: "198.51.100.7:51820", B: MAPPED})
    assert servers.discover(A, B) == Finding(endpoint("198.51.100.7:51820"), NatType.NONE)
    assert servers.asked == [A]


def test_incredible_answer_counts_as_a_failure() -> None:
    servers = Servers({A: "192.168.1.2:51820", B: MAPPED})
    assert servers.discover(A, B) == Finding(endpoint(MAPPED), NatType.UNKNOWN)


def test_ipv6_is_asked_only_when_nobody_answers_over_ipv4() -> None:
    servers = Servers({A6: MAPPED6, B6: MAPPED6, B: MAPPED})
    assert servers.discover(A6, A, B6, B) == Finding(endpoint(MAPPED), NatType.UNKNOWN)
    assert servers.asked == [A, B]
    servers = Servers({A6: MAPPED6, B6: MAPPED6})
    assert servers.discover(A6, A, B6, B) == Finding(endpoint(MAPPED6), NatType.FULL_CONE)
    assert servers.asked == [A, B, A6, B6]


def test_first_address_of_each_family_stands_for_a_name_which_is_looked_up_once() -> None:
    servers = Servers({A6: MAPPED6}, {"stun.example.net": ["203.0.113.1", "203.0.113.2", "2001:db8::1", "2001:db8::2"]})
    assert servers.discover("stun.example.net:3478") == Finding(endpoint(MAPPED6), NatType.UNKNOWN)
    assert servers.asked == [A, A6]
    assert servers.looked_up == ["stun.example.net"]


def test_second_name_of_one_address_is_no_second_opinion() -> None:
    servers = Servers({A: MAPPED, "203.0.113.1:19302": MAPPED}, {"other.example.net": ["203.0.113.1"]})
    assert servers.discover(A, "other.example.net:19302") == Finding(endpoint(MAPPED), NatType.UNKNOWN)
    assert servers.asked == [A]


def test_failure_says_what_is_wrong_with_each_server() -> None:
    with pytest.raises(StunError, match=r"^nowhere\.example does not resolve; 203\.0\.113\.1:3478: no answer"):
        Servers({}).discover("nowhere.example:3478", A)


def test_missing_capability_ends_a_discovery() -> None:
    with pytest.raises(NotPermitted):
        Servers({A: NotPermitted("grant CAP_NET_RAW"), B: MAPPED}).discover(A, B)


async def test_reports_wait_as_long_as_the_control_plane_asks() -> None:
    stage = Stage(Look(ONE), Plane([RateLimited("429", status=429, retry_after=300.0), ()]))
    await stage.run(500)
    assert stage.plane.times[1] - stage.plane.times[0] >= 300
    assert len(stage.look.times) > 6


async def test_postponed_reports_of_a_fleet_are_spread() -> None:
    stage = Stage(Look(ONE), Plane([RateLimited("429", status=429, retry_after=300.0), ()]), uniform=highest)
    await stage.run(500)
    assert stage.plane.times[1] - stage.plane.times[0] >= 375


async def test_new_node_does_not_serve_the_wait_of_the_old_one() -> None:
    stage = Stage(Look(ONE), Plane([RateLimited("429", status=429, retry_after=3600.0), ()]))
    other = replace(stage.node.identity, node_id="n_new")
    asyncio.get_running_loop().call_at(10, stage.node.renew, other, stage.node.desired, 0.0)
    await stage.run(100)
    assert stage.plane.times == pytest.approx([0.1, 60.2], abs=0.2)
