"""What the daemon tells about itself, from before it is registered to its end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from plexd.config.models import Config
from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.errors import KernelError
from plexd.mesh.address import Endpoint, parse_ip
from plexd.mesh.desired import Candidates, DataEntry, EndpointSource, Policy, PolicyRule, Rejection
from plexd.mesh.events import EndpointOffered
from plexd.mesh.target import Settings
from plexd.node.connection_status import ConnectionStatus, Stream
from plexd.node.control_calls import SelfDescription
from plexd.node.health import CONDITION_PROBLEMS, Condition, Health
from plexd.node.state import Node
from plexd.node.status import Membership, Overview, Phase
from plexd.store.identity import Identity
from tests.fakes import FakeKernel
from tests.node_harness import enforcing, make_node, peer, settings_of

NAT = {"public_endpoint": "198.51.100.9:51820", "type": "full_cone"}
NOW = 1_800_000_000.0
DESCRIPTION = SelfDescription("edge-7", {}, "0.4.1", "sha256:" + "8f" * 32)


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def unix(self) -> float:
        return NOW + self.seconds

    def monotonic(self) -> float:
        return self.seconds


class Stage:
    """A daemon's overview; `join` gives it a node with a mesh in a kernel in memory."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.health = Health(self.clock.unix)
        self.overview = Overview(
            Config(api="https://cp.example.net"), self.health, self.clock.unix, self.clock.monotonic
        )
        self.overview.description = DESCRIPTION
        self.kernel = FakeKernel()
        self.settings: Callable[[Identity], Settings | None] = settings_of
        self.node: Node

    async def join(self, node: Node | None = None) -> None:
        self.node = node or make_node(peer(2, endpoint="192.0.2.2:51820"), health=self.health)
        self.node.connection = ConnectionStatus(self.clock.unix, self.clock.monotonic)
        self.node.desired = replace(
            self.node.desired,
            candidates={
                p.id: Candidates().offer(EndpointSource.PEER, p.endpoint) for p in self.node.desired.peers.values()
            },
        )
        mesh = build_mesh(self.kernel, self.kernel.table, self.node, self.settings, self.health, self.clock.unix)
        self.converger = Converger([mesh.resource], self.health)
        self.overview.membership = Membership(self.node, mesh.view)
        self.overview.members["nat"] = lambda: NAT
        self.overview.phase = Phase.RUNNING
        assert (await self.converger.converge()).failed == 0
        self.node.connection.stream_is(Stream.CONNECTED)

    async def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self.overview.status())
        return found

    async def peers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(await self.overview.peers())
        return found

    async def policies(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self.overview.policies())
        return found


# status


async def test_status_before_registration_has_every_member_and_knows_little() -> None:
    stage = Stage()
    stage.overview.description = None
    assert await stage.status() == {
        "node_id": None,
        "mesh_ip": None,
        "hostname": None,
        "mode": "node",
        "version": None,
        "state": "starting",
        "started_at": "2027-01-15T08:00:00Z",
        "uptime": "0s",
        "binary_checksum": None,
        "control_plane": {
            "url": "https://cp.example.net",
            "event_stream": "stopped",
            "reconnects": 0,
            "last_event_at": None,
            "last_heartbeat_at": None,
            "last_heartbeat_ok": None,
            "last_reconcile_at": None,
            "last_reconcile_error": "",
        },
        "conditions": [],
        "mesh": None,
        "nat": None,
        "counts": None,
        "actions": {"enabled": False, "running": 0, "max_concurrent": 0, "results_pending": 0},
        "hooks": {"enabled": False, "total": 0, "not_ok": 0},
        "access": {"ssh_sessions": 0, "max_sessions": 0, "host_key_fingerprint": None},
    }
    assert await stage.peers() == []


async def test_status_of_a_connected_node() -> None:
    stage = Stage()
    await stage.join()
    stage.node.desired = replace(
        stage.node.desired,
        metadata={"role": "db"},
        data={"a": DataEntry("a", "text/plain", '"x"', 1, ""), "b": DataEntry("b", "text/plain", '"x"', 1, "")},
        secret_refs={"db-pass": 2},
    )
    stage.kernel.shake_hands(stage.node.desired.peers["n_2"].public_key, NOW + 8100)
    stage.clock.seconds = 8164
    contact = stage.node.connection
    contact.event_arrived()
    contact.heartbeat_sent(True)
    contact.state_pulled()
    status = await stage.status()
    assert (status["node_id"], status["mesh_ip"], status["hostname"]) == ("n_self", "10.100.0.1", "edge-7")
    assert (status["version"], status["binary_checksum"]) == ("0.4.1", DESCRIPTION.checksum)
    assert (status["state"], status["uptime"]) == ("connected", "2h16m4s")
    assert status["control_plane"] == {
        "url": "https://cp.example.net",
        "event_stream": "connected",
        "reconnects": 0,
        "last_event_at": "2027-01-15T10:16:04Z",
        "last_heartbeat_at": "2027-01-15T10:16:04Z",
        "last_heartbeat_ok": True,
        "last_reconcile_at": "2027-01-15T10:16:04Z",
        "last_reconcile_error": "",
    }
    assert status["mesh"] == {"interface": "plexd0", "up": True, "listen_port": 51820, "peer_count": 1}
    assert status["nat"] == {"public_endpoint": "198.51.100.9:51820", "type": "full_cone"}
    assert status["counts"] == {
        "metadata": 1, "data": 2, "secrets": 1, "reports": 0, "reports_pending": 0, "reports_rejected": 0,
    }  # fmt: skip


async def test_state_follows_phase_heartbeat_and_conditions() -> None:
    stage = Stage()
    states = [(await stage.status())["state"]]
    stage.overview.phase = Phase.REGISTERING
    states.append((await stage.status())["state"])
    await stage.join()
    states.append((await stage.status())["state"])  # no heartbeat yet
    stage.node.connection.heartbeat_sent(True)
    states.append((await stage.status())["state"])
    stage.node.connection.heartbeat_sent(False)
    states.append((await stage.status())["state"])
    stage.node.connection.heartbeat_sent(True)
    stage.health.set(Condition.CLOCK_SKEW, True, "+73 s")
    states.append((await stage.status())["state"])
    stage.overview.phase = Phase.STOPPING
    states.append((await stage.status())["state"])
    assert states == ["starting", "registering", "starting", "connected", "degraded", "degraded", "stopping"]


async def test_condition_says_since_when_and_what_to_do() -> None:
    stage = Stage()
    stage.clock.seconds = 60
    stage.health.set(Condition.CLOCK_SKEW, True, "+73 s")
    meaning = CONDITION_PROBLEMS[Condition.CLOCK_SKEW]
    assert (await stage.status())["conditions"] == [
        {
            "code": "clock_skew",
            "severity": "warning",
            "text": f"{meaning.text} (+73 s)",
            "since": "2027-01-15T08:01:00Z",
            "remedy": meaning.remedy,
        }
    ]


async def test_missing_interface_is_down_and_not_an_error() -> None:
    stage = Stage()
    await stage.join()
    stage.kernel.delete_link()
    down = {"interface": "plexd0", "up": False, "listen_port": None, "peer_count": 0}
    assert (await stage.status())["mesh"] == down
    stage.kernel.failure = KernelError("could not look")
    assert (await stage.status())["mesh"] == down
    assert [entry["obstacle"]["code"] for entry in await stage.peers()] == ["interface_missing"]


# peers


async def test_peers_have_the_contracts_members_and_say_which_way_and_why_not() -> None:
    stage = Stage()
    await stage.join(
        make_node(peer(2, endpoint="192.0.2.2:51820"), peer(3, endpoint="192.0.2.3:51820"), health=stage.health)
    )
    key = stage.node.desired.peers["n_2"].public_key
    stage.kernel.roam(key, Endpoint(parse_ip("2001:db8::7"), 4711), NOW + 1.5)
    stage.node.desired = replace(stage.node.desired, rejected=(Rejection("n_9", "bad public key: all zero"),))
    stage.clock.seconds = 72
    first, second, rejected = await stage.peers()
    assert first == {
        "id": "n_2",
        "mesh_ip": "10.100.0.2",
        "public_key": str(key),
        "endpoint": "[2001:db8::7]:4711",
        "endpoint_source": "roamed",
        "path": "direct",
        "allowed_ips": ["10.100.0.2/32"],
        "last_handshake_at": "2027-01-15T08:00:01.5Z",
        "rx_bytes": 0,
        "tx_bytes": 0,
        "psk_set": False,
        "connected": True,
        "obstacle": None,
    }
    assert (second["endpoint_source"], second["connected"], second["last_handshake_at"]) == ("state", False, None)
    assert second["obstacle"]["code"] == "no_handshake"
    assert "for 1m12s" in second["obstacle"]["text"]
    assert (rejected["id"], rejected["mesh_ip"], rejected["obstacle"]["code"]) == ("n_9", None, "rejected")
    assert set(rejected) == set(first)


async def test_one_peer_is_told_by_id_and_by_address_with_all_its_endpoints() -> None:
    stage = Stage()
    assert await stage.overview.peer("n_2") is None
    await stage.join(make_node(peer(2, endpoint="192.0.2.2:51820"), health=stage.health))
    stage.node.fold(EndpointOffered("n_2", "gate.example:51820", EndpointSource.REPORT))
    found = json.loads(await stage.overview.peer("n_2") or b"")
    assert json.loads(await stage.overview.peer("10.100.0.2") or b"") == found
    (listed,) = await stage.peers()
    assert {name: found[name] for name in listed} == listed
    assert found["candidates"] == [
        {"endpoint": "gate.example:51820", "source": "report", "resolved": None},
        {"endpoint": "192.0.2.2:51820", "source": "state", "resolved": "192.0.2.2:51820"},
    ]
    assert (found["node"]["mtu"], found["node"]["generation"]) == (1420, 1)
    for unknown in ("n_3", "10.100.0.3", "", "10.100.0", "\udcff"):
        assert await stage.overview.peer(unknown) is None


async def test_time_on_the_interface_is_forgotten_with_the_peer() -> None:
    stage = Stage()
    await stage.join()
    membership = stage.overview.membership
    assert membership is not None
    assert dict(membership.mesh.since) == {"n_2": NOW}
    stage.node.desired = replace(stage.node.desired, peers={})
    await stage.converger.apply_event()
    assert dict(membership.mesh.since) == {}


# readiness


@pytest.mark.parametrize(
    ("refused", "link", "silent", "stopped", "reason"),
    [
        (False, True, False, False, None),
        (True, False, True, True, "registration_pending"),
        (False, False, True, True, "mesh_down"),
        (False, True, True, True, "event_delivery_stopped"),
        (False, True, False, True, "subsystem_stopped"),
    ],
)
async def test_first_reason_that_applies_is_given(
    refused: bool, link: bool, silent: bool, stopped: bool, reason: str | None
) -> None:
    stage = Stage()
    await stage.join()
    if refused:
        stage.node.refuse()
    if not link:
        stage.kernel.delete_link()
    stage.health.set(Condition.SUBSYSTEM_STOPPED, stopped)
    if silent:
        stage.node.connection.stream_is(Stream.CONNECTING)
        stage.clock.seconds = 181  # three intervals of 60 s
    assert await stage.overview.not_ready() == reason


def test_node_that_never_registered_is_not_ready() -> None:
    assert asyncio.run(Stage().overview.not_ready()) == "registration_pending"


async def test_unreachable_control_plane_alone_leaves_a_node_ready_for_three_intervals() -> None:
    stage = Stage()
    await stage.join()
    stage.node.connection.heartbeat_sent(False)
    stage.node.connection.stream_is(Stream.CONNECTING)
    reasons = []
    for stage.clock.seconds in (0, 179, 180, 181):
        reasons.append(await stage.overview.not_ready())
    stage.node.connection.state_pulled()  # polling works
    reasons.append(await stage.overview.not_ready())
    assert reasons == [None, None, None, "event_delivery_stopped", None]


async def test_readiness_looks_at_the_kernel_every_five_seconds_at_most() -> None:
    stage = Stage()
    await stage.join()
    looks = stage.kernel.looks
    for _ in range(100):
        assert await stage.overview.not_ready() is None
    assert stage.kernel.looks == looks + 1
    stage.kernel.delete_link()
    stage.clock.seconds = 5.1
    assert await stage.overview.not_ready() == "mesh_down"


async def test_health_is_readiness_and_conditions_in_one() -> None:
    stage = Stage()
    await stage.join()
    assert json.loads(await stage.overview.health()) == {
        "status": "healthy", "ready": True, "reason": None, "conditions": [],
    }  # fmt: skip
    stage.health.set(Condition.STATE_STALE, True, "last fetched 200 s ago")
    health = json.loads(await stage.overview.health())
    assert (health["status"], health["ready"]) == ("degraded", True)
    assert [condition["code"] for condition in health["conditions"]] == ["state_stale"]


# policies


def counted(**rules: int) -> dict[str, Any]:
    """A table as nft tells it, whose rules with these comments met so many packets of 100 bytes."""
    entries = [
        {"rule": {"comment": comment.replace("_", "#"), "expr": [{"counter": {"packets": n, "bytes": 100 * n}}]}}
        for comment, n in rules.items()
    ]
    return {"nftables": entries}


async def test_policies_tell_what_each_rule_met_and_why_others_do_nothing() -> None:
    stage = Stage()
    stage.settings = enforcing
    assert (await stage.policies())["policies"] == []
    await stage.join()
    rules = (
        PolicyRule("n_self", "n_2", 443, "tcp", "allow"),
        PolicyRule("*", "n_9", 0, "", "allow"),
        PolicyRule("n_2", "10.100.0.9", 0, "", "allow"),
        PolicyRule("*", "*", 0, "gre", "allow"),
        PolicyRule("*", "*", 0, "gre", "deny"),
    )
    stage.node.desired = replace(stage.node.desired, policies=(Policy("web", rules),))
    stage.kernel.hits = counted(web_0=3, web_4=1)
    told = await stage.policies()
    assert told["default"] == "deny"
    assert told["enforced"] is True
    assert told["policies"][0]["id"] == "web"
    seen = told["policies"][0]["rules"]
    assert seen[0] == {
        "src": "n_self", "dst": "n_2", "port": 443, "protocol": "tcp", "action": "allow",
        "packets": 3, "bytes": 300, "note": None,
    }  # fmt: skip
    assert [rule["note"] for rule in seen[1:]] == [
        "node n_9 is not known or has no mesh address",
        "about other nodes",
        "bad protocol: ignored",
        "bad protocol: denies as much as it can",
    ]
    assert [rule["packets"] for rule in seen] == [3, None, None, None, 1]


async def test_one_peer_is_told_with_the_rules_that_decide_each_direction() -> None:
    stage = Stage()
    stage.settings = enforcing
    await stage.join()
    rules = (
        PolicyRule("n_2", "n_self", 443, "tcp", "allow"),
        PolicyRule("n_3", "n_self", 0, "", "allow"),
        PolicyRule("10.100.0.0/16", "10.100.0.1", 0, "", "deny"),
        PolicyRule("n_2", "*", 22, "tcp", "allow"),
    )
    stage.node.desired = replace(stage.node.desired, policies=(Policy("web", rules),))
    stage.kernel.hits = counted(web_0=3)
    policy = json.loads(await stage.overview.peer("n_2") or b"")["node"]["policy"]
    assert policy["default"] == "deny"
    assert [(rule["rule"], rule["action"], rule["packets"]) for rule in policy["inward"]] == [
        (0, "allow", 3),
        (2, "deny", 0),
    ]
    assert policy["outward"] == []


async def test_policies_without_a_table_have_no_counts() -> None:
    stage = Stage()
    stage.settings = enforcing
    await stage.join()
    rules = (PolicyRule("n_self", "n_2", 443, "tcp", "allow"),)
    stage.node.desired = replace(stage.node.desired, policies=(Policy("web", rules),))
    assert (await stage.policies())["policies"][0]["rules"][0]["packets"] is None
