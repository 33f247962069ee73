"""What each of the 24 events does: once, twice, about somebody unknown, with a payload nobody can use."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
from structlog.testing import capture_logs

from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.errors import KernelError
from plexd.events.dispatch import Dispatch
from plexd.events.state import StateEvents
from plexd.mesh.changes import AddRoute, Change, PutPeer, RemovePeer, RemoveRoute
from plexd.mesh.desired import Candidates, DataEntry, Desired, EndpointSource, SigningKeys
from plexd.mesh.events import ActionRequested, RotationRequested, SSHSessionRequested
from plexd.mesh.keys import PresharedKey
from plexd.node.health import Condition, Health
from plexd.node.state import Node
from plexd.wire.envelope import Envelope
from plexd.wire.payloads import EVENT_TYPES
from plexd.wire.times import format_time, parse_nanoseconds
from tests.fakes import FakeKernel
from tests.node_harness import (
    EPOCH,
    NEW_KEY,
    OLD_KEY,
    Asked,
    make_node,
    own_node,
    peer,
    public,
    public_key,
    settings_of,
    signing_text,
    wire_peer,
)

PSK = PresharedKey(bytes([0xA1] * 32))
ENTRY = DataEntry("motd", "text/plain", '"hello"', 3, "2027-01-15T08:00:00Z")
WIRE_ENTRY = {
    "key": "motd", "content_type": "text/plain", "payload": "hello", "version": 3, "updated_at": "2027-01-15T08:00:00Z"
}  # fmt: skip


@dataclass
class Done:
    """What happened besides the change of the desired snapshot."""

    pulls: Asked = field(default_factory=Asked)
    rotations: Asked = field(default_factory=Asked)
    actions: list[str] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    saved_keys: list[SigningKeys] = field(default_factory=list)
    saved_entries: list[Desired] = field(default_factory=list)


class World:
    """A node with two peers in a kernel, and its handler of events."""

    def __init__(self) -> None:
        self.health = Health()
        self.node: Node = make_node(peer(2), peer(3, endpoint="192.0.2.3:51820"), health=self.health)
        self.kernel = FakeKernel()
        self.mesh = build_mesh(self.kernel, self.kernel.table, self.node, settings_of, self.health, lambda: EPOCH)
        self.converger = Converger([self.mesh.resource], self.health)
        self.done = Done()
        self.dispatch = Dispatch(own_node, self.done.pulls, lambda: EPOCH)
        state = StateEvents(self.node, self.converger.apply_event, self.done.pulls, self._save, self._save_entries)
        self.dispatch.add(state.component().events)
        self.dispatch.add(
            {
                RotationRequested: self._rotate,
                ActionRequested: self._note_action,
                SSHSessionRequested: self._note_session,
            }
        )
        self.was: Desired

    async def _rotate(self, _event: RotationRequested, _envelope: object) -> None:
        self.done.rotations("event")

    async def _note_action(self, event: ActionRequested, _envelope: object) -> None:
        self.done.actions.append(event.execution_id)

    async def _note_session(self, event: SSHSessionRequested, _envelope: object) -> None:
        self.done.sessions.append(event.session_id)

    async def _save(self, keys: SigningKeys, event_id: str) -> None:
        assert event_id == "ev-1"
        self.done.saved_keys.append(keys)

    async def _save_entries(self, desired: Desired) -> None:
        held = self.node.desired
        assert (desired.metadata, desired.data, desired.secret_refs) != (held.metadata, held.data, held.secret_refs)
        self.done.saved_entries.append(desired)

    async def come_up(self) -> None:
        await self.converger.converge()
        self.was = self.node.desired
        self.kernel.netlink_writes = self.kernel.looks = 0
        self.kernel.applied.clear()

    async def handle(self, event_type: str, payload: Any, issued: float = EPOCH) -> None:
        text = payload if isinstance(payload, str) else json.dumps(payload)
        issued_at = format_time(issued)
        nanoseconds = parse_nanoseconds(issued_at)
        assert nanoseconds is not None
        await self.dispatch.handle(Envelope(event_type, "ev-1", issued_at, nanoseconds // 1000, "n", text, b""))


def after(*events: tuple[str, Any]) -> World:
    async def main() -> World:
        world = World()
        await world.come_up()
        for event in events:
            await world.handle(*event)
        return world

    return asyncio.run(main())


class Row(NamedTuple):
    """An event and what it does; `desired` gives the snapshot afterwards from the one before."""

    event_type: str
    payload: Any
    desired: Callable[[Desired], Desired] = lambda was: was
    pulls: tuple[str, ...] = ()
    rotations: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    applied: tuple[type[Change], ...] = ()


def with_peer_4(was: Desired) -> Desired:
    offered = Candidates(((EndpointSource.PEER, "192.0.2.4:51820"),))
    added = peer(4, endpoint="192.0.2.4:51820")
    return replace(was, peers={**was.peers, "n_4": added}, candidates={**was.candidates, "n_4": offered})


def without_peer_2(was: Desired) -> Desired:
    return replace(was, peers={k: v for k, v in was.peers.items() if k != "n_2"})


def with_new_key_for_peer_2(psk: PresharedKey | None = None) -> Callable[[Desired], Desired]:
    def change(was: Desired) -> Desired:
        known = was.peers["n_2"]
        rotated = known._replace(public_key=public_key(9), psk=psk or known.psk)
        return replace(was, peers={**was.peers, "n_2": rotated}, candidates={**was.candidates, "n_2": Candidates()})

    return change


def with_endpoint_of_peer_2(was: Desired) -> Desired:
    offered = Candidates(((EndpointSource.EVENT, "203.0.113.8:51820"),))
    return replace(was, candidates={**was.candidates, "n_2": offered})


ROTATED = SigningKeys(public(NEW_KEY), public(OLD_KEY), EPOCH + 3600)
DAY = SigningKeys(public(NEW_KEY), public(OLD_KEY), EPOCH + 86_400)

ROWS = [
    Row("peer_added", wire_peer(4, endpoint="192.0.2.4:51820"), with_peer_4, applied=(PutPeer, AddRoute)),
    Row("peer_added", wire_peer(2) | {"id": "n_self"}),  # about ourselves
    Row("peer_removed", {"peer_id": "n_2"}, without_peer_2, applied=(RemovePeer, RemoveRoute)),
    Row("peer_removed", {"id": "n_2", "peer_id": "n_3"}, without_peer_2, applied=(RemovePeer, RemoveRoute)),
    Row("peer_removed", {"peer_id": "n_unknown"}),
    Row("peer_key_rotated", {"peer_id": "n_2", "public_key": str(public_key(9))}, with_new_key_for_peer_2(),
        applied=(RemovePeer, PutPeer)),
    Row("peer_key_rotated", {"id": "n_2", "new_public_key": str(public_key(9)), "new_psk": PSK.reveal()},
        with_new_key_for_peer_2(PSK), applied=(RemovePeer, PutPeer)),
    Row("peer_key_rotated", wire_peer(4, endpoint="192.0.2.4:51820"), with_peer_4, applied=(PutPeer, AddRoute)),
    Row("peer_key_rotated", {"peer_id": "n_unknown", "public_key": str(public_key(9))}, pulls=("unusable event",)),
    Row("peer_endpoint_changed", {"peer_id": "n_2", "endpoint": "203.0.113.8:51820"}, with_endpoint_of_peer_2,
        applied=(PutPeer,)),
    Row("peer_endpoint_changed", {"peer_id": "n_unknown", "endpoint": "203.0.113.8:51820"}, pulls=("unusable event",)),
    Row("policy_updated", None, pulls=("policy_updated",)),
    Row("action_request", {"execution_id": "x-1", "action": "gather_info"}, actions=("x-1",)),
    Row("session_revoked", {"session_id": "s-1"}),
    Row("ssh_session_setup", {"session_id": "s-1"}, sessions=("s-1",)),
    Row("rotate_keys", "null", rotations=("event",)),
    Row("signing_key_rotated", {"current": signing_text(NEW_KEY), "previous": signing_text(OLD_KEY),
                                "transition_expires": format_time(EPOCH + 3600)},
        lambda was: replace(was, signing_keys=ROTATED)),
    Row("signing_key_rotated", {"new_signing_public_key": signing_text(NEW_KEY)},
        lambda was: replace(was, signing_keys=DAY)),
    Row("node_state_updated", {"metadata": {"rack": "12"}}, lambda was: replace(was, metadata={"rack": "12"})),
    Row("node_state_updated", {"data": [WIRE_ENTRY]}, lambda was: replace(was, data={"motd": ENTRY})),
    Row("node_state_updated", {}, pulls=("node_state_updated",)),
    Row("node_secrets_updated", {"secret_refs": [{"key": "db", "version": 2}]},
        lambda was: replace(was, secret_refs={"db": 2})),
    Row("node_secrets_updated", {}, pulls=("node_secrets_updated",)),
    Row("bridge_config_updated", None),
    Row("relay_session_assigned", {"session_id": "r-1"}),
    Row("relay_session_revoked", {"session_id": "r-1"}),
    Row("user_access_config_updated", None),
    Row("user_access_peer_assigned", {"public_key": str(public_key(7)), "allowed_ips": []}),
    Row("user_access_peer_revoked", {"public_key": str(public_key(7))}),
    Row("ingress_config_updated", None),
    Row("ingress_rule_assigned", {"rule_id": "i-1"}),
    Row("ingress_rule_revoked", {"rule_id": "i-1"}),
    Row("site_to_site_config_updated", None),
    Row("site_to_site_tunnel_assigned", {"tunnel_id": "t-1"}),
    Row("site_to_site_tunnel_revoked", {"tunnel_id": "t-1"}),
    Row("something_new", {"from": "the future"}),
]  # fmt: skip


def row_id(row: Row) -> str:
    return row.event_type


def test_table_has_all_24_events() -> None:
    assert len(EVENT_TYPES) == 24
    assert {row.event_type for row in ROWS} - {"something_new"} == set(EVENT_TYPES)


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_event_has_its_effect_and_no_other(row: Row) -> None:
    world = after((row.event_type, row.payload))
    assert world.node.desired == row.desired(world.was)
    assert tuple(world.done.pulls.reasons) == row.pulls
    assert tuple(world.done.rotations.reasons) == row.rotations
    assert tuple(world.done.actions) == row.actions
    assert tuple(world.done.sessions) == row.sessions
    assert tuple(type(change) for change in world.kernel.applied) == row.applied


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_event_is_applied_without_a_look_at_the_kernel(row: Row) -> None:
    assert after((row.event_type, row.payload)).kernel.looks == 0


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_same_event_twice_equals_once(row: Row) -> None:
    once, twice = after((row.event_type, row.payload)), after(*[(row.event_type, row.payload)] * 2)
    assert twice.node.desired == once.node.desired
    assert twice.kernel.applied == once.kernel.applied
    assert twice.done.saved_keys == once.done.saved_keys


@pytest.mark.parametrize("row", [row for row in ROWS if row.desired is not Row._field_defaults["desired"]], ids=row_id)
def test_folded_event_moves_the_generation_and_asks_to_be_saved(row: Row) -> None:
    world = after((row.event_type, row.payload))
    assert world.node.generation == 1
    assert world.node.unsaved.is_set()


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_event_moves_the_generation_as_often_as_it_comes(row: Row) -> None:
    """Also when it changes nothing: a state answer on its way may be older than what it says."""
    once, twice = after((row.event_type, row.payload)), after(*[(row.event_type, row.payload)] * 2)
    assert twice.node.generation == 2 * once.node.generation


def test_event_about_a_peer_that_is_not_here_yet_is_no_error() -> None:
    with capture_logs() as records:
        after(("peer_endpoint_changed", {"peer_id": "n_unknown", "endpoint": "203.0.113.8:51820"}))
    (record,) = (record for record in records if record["event"] == "event does not fit the snapshot, state pulled")
    assert record["log_level"] == "info"
    assert "n_unknown" in record["reason"]


def test_event_that_changes_nothing_moves_the_generation() -> None:
    assert after(("peer_removed", {"peer_id": "n_unknown"})).node.generation == 1


async def test_signing_keys_are_on_disk_before_they_count() -> None:
    row = next(row for row in ROWS if row.event_type == "signing_key_rotated")
    world = World()
    await world.come_up()

    def counted() -> None:
        assert world.done.saved_keys == [ROTATED]

    world.node.on_signing_keys.append(counted)
    await world.handle(row.event_type, row.payload)
    assert world.node.desired.signing_keys == ROTATED


NO_KEY = "AAAA"
NOT_AN_OBJECT = ["null", "[]", '"text"', "7", "true"]
BAD = {
    "peer_added": [*NOT_AN_OBJECT, {}, wire_peer(4) | {"id": ""}, wire_peer(4) | {"public_key": NO_KEY},
                   wire_peer(4) | {"public_key": ""}, wire_peer(4) | {"mesh_ip": "10.100.0.444"},
                   wire_peer(4) | {"allowed_ips": ["10.0.0.0/33"]}, wire_peer(4) | {"allowed_ips": 7},
                   wire_peer(4) | {"endpoint": "here"}, wire_peer(4) | {"psk": "short"}, wire_peer(4) | {"id": 4},
                   wire_peer(4) | {"public_key": str(public_key(2))}],
    "peer_removed": [*NOT_AN_OBJECT, {}, {"peer_id": ""}, {"peer_id": 2}],
    "peer_key_rotated": [*NOT_AN_OBJECT, {}, {"peer_id": "n_2"}, {"peer_id": "n_2", "public_key": NO_KEY},
                         {"public_key": str(public_key(9))},
                         {"peer_id": "n_2", "public_key": str(public_key(9)), "psk": "short"},
                         {"peer_id": "n_2", "public_key": str(public_key(9)), "mesh_ip": "x"},
                         {"peer_id": "n_2", "public_key": str(public_key(3))}],
    "peer_endpoint_changed": [*NOT_AN_OBJECT, {}, {"peer_id": "n_2"}, {"endpoint": "192.0.2.1:1"},
                              {"peer_id": "n_2", "endpoint": ""}, {"peer_id": "n_2", "endpoint": "192.0.2.1"},
                              {"peer_id": "n_2", "endpoint": "192.0.2.1:0"}, {"peer_id": "n_2", "endpoint": 51820}],
    "action_request": [*NOT_AN_OBJECT, {}, {"execution_id": "", "action": "ping"}, {"execution_id": "x"},
                       {"execution_id": "../x", "action": "ping"}, {"execution_id": 7, "action": "ping"},
                       {"execution_id": "x", "action": "p" * 129}],
    "session_revoked": [*NOT_AN_OBJECT, {}, {"session_id": ""}, {"session_id": 7}, {"session_id": "a/b"}],
    "ssh_session_setup": [*NOT_AN_OBJECT, {}, {"session_id": ""}, {"session_id": 7}, {"session_id": "a/b"}],
    "signing_key_rotated": [*NOT_AN_OBJECT, {}, {"current": NO_KEY}, {"current": 7}, {"new_signing_public_key": NO_KEY},
                            {"new_signing_public_key": signing_text(NEW_KEY), "transition_period": "soon"},
                            {"new_signing_public_key": signing_text(NEW_KEY), "transition_period": "-1h"}],
    "node_state_updated": [*NOT_AN_OBJECT, {"metadata": []}, {"metadata": {"a": 1}}, {"data": {}},
                           {"data": [{"key": ""}]}, {"data": [WIRE_ENTRY, WIRE_ENTRY | {"version": "4"}]}],
    "node_secrets_updated": [*NOT_AN_OBJECT, {"secret_refs": {}}, {"secret_refs": [{"version": 2}]},
                             {"secret_refs": [{"key": "db", "version": "2"}]}],
}  # fmt: skip
DROPPED = {"action_request", "session_revoked", "ssh_session_setup"}


@pytest.mark.parametrize(
    ("event_type", "payload"),
    [
        pytest.param(event_type, payload, id=f"{event_type} {payload}"[:60])
        for event_type, payloads in BAD.items()
        for payload in payloads
    ],
)
def test_bad_payload_changes_nothing(event_type: str, payload: Any) -> None:
    with capture_logs() as lines:
        world = after((event_type, payload))
    assert world.node.desired == world.was
    assert world.kernel.applied == []
    assert (world.done.actions, world.done.sessions, world.done.saved_keys) == ([], [], [])
    assert world.done.rotations.calls == []
    assert len(world.done.pulls.calls) == (0 if event_type in DROPPED else 1)
    errors = [line for line in lines if line["log_level"] == "error"]
    assert [(line["event_id"], bool(line["reason"])) for line in errors] == [("ev-1", True)]


@pytest.mark.parametrize("payload", [*NOT_AN_OBJECT, {"a": 1}])
@pytest.mark.parametrize(
    "event_type",
    ["policy_updated", "rotate_keys", *(row.event_type for row in ROWS if row.event_type.endswith("_config_updated"))],
)
def test_nothing_is_read_from_payloads_that_say_nothing(event_type: str, payload: Any) -> None:
    with capture_logs() as lines:
        world = after((event_type, payload))
    assert len(world.done.pulls.calls) + len(world.done.rotations.calls) == (
        event_type in {"policy_updated", "rotate_keys"}
    )
    assert [line for line in lines if line["log_level"] == "error"] == []


@pytest.mark.parametrize("row", [row for row in ROWS if row.event_type in EVENT_TYPES[12:]], ids=row_id)
def test_event_of_a_feature_that_is_off_is_one_debug_line(row: Row) -> None:
    with capture_logs() as lines:
        after((row.event_type, row.payload))
    assert [line["log_level"] for line in lines if line["component"] == "events"] == ["debug"]


@pytest.mark.parametrize(
    ("event_type", "old", "new", "shown"),
    [
        ("node_state_updated", {"metadata": {"v": "old"}}, {"metadata": {"v": "new"}}, "metadata"),
        ("node_secrets_updated", {"secret_refs": [{"key": "db", "version": 1}]},
         {"secret_refs": [{"key": "db", "version": 2}]}, "secret_refs"),
    ],
)  # fmt: skip
async def test_older_state_does_not_undo_a_newer_one(event_type: str, old: Any, new: Any, shown: str) -> None:
    world = World()
    await world.come_up()
    await world.handle(event_type, new, EPOCH)
    newest = world.node.desired
    await world.handle(event_type, old, EPOCH - 1)
    assert getattr(world.node.desired, shown) == getattr(newest, shown)


async def test_newer_state_of_the_old_node_does_not_hide_an_older_one_of_the_new() -> None:
    world = World()
    await world.come_up()
    await world.handle("node_state_updated", {"metadata": {"v": "old node"}}, EPOCH)
    world.node.renew(world.node.identity, Desired(), 0.0)
    await world.handle("node_state_updated", {"metadata": {"v": "new node"}}, EPOCH - 1)
    assert world.node.desired.metadata == {"v": "new node"}


def test_data_entry_never_goes_back_in_version() -> None:
    world = after(
        ("node_state_updated", {"data": [WIRE_ENTRY]}),
        ("node_state_updated", {"data": [WIRE_ENTRY | {"version": 2, "payload": "older"}]}),
    )
    assert world.node.desired.data["motd"] == ENTRY


async def test_change_that_the_kernel_refuses_asks_for_a_pull() -> None:
    world = World()
    await world.come_up()
    world.kernel.refuse = lambda change: "no" if isinstance(change, PutPeer) else None
    await world.handle("peer_added", wire_peer(4))
    assert world.done.pulls.reasons == ["event not applied"]
    assert "n_4" in world.node.desired.peers
    assert {finding.condition for finding in world.health.findings()} == {Condition.CHANGES_FAILED}


async def test_kernel_that_does_not_answer_asks_for_a_pull() -> None:
    world = World()
    await world.come_up()
    world.kernel.failure = KernelError("gone")
    await world.handle("peer_removed", {"peer_id": "n_2"})
    assert world.done.pulls.reasons == ["event not applied"]


async def test_entries_are_on_disk_before_they_count_and_programs_hear_of_them() -> None:
    world = World()
    await world.come_up()
    heard: list[Desired] = []
    world.node.on_entries.append(lambda: heard.append(world.node.desired))
    await world.handle("node_state_updated", {"data": [WIRE_ENTRY]})
    await world.handle("node_secrets_updated", {"secret_refs": [{"key": "db", "version": 2}]}, EPOCH + 1)
    assert len(heard) == 2
    await world.handle("node_state_updated", {"data": [WIRE_ENTRY]}, EPOCH + 1)
    await world.handle("peer_removed", {"peer_id": "n_2"})
    assert len(heard) == 2
    assert [set(saved.data) for saved in world.done.saved_entries] == [{"motd"}, {"motd"}]
    assert [dict(saved.secret_refs) for saved in world.done.saved_entries] == [{}, {"db": 2}]


def test_two_handlers_for_one_type_of_event_are_a_mistake() -> None:
    async def handler(_event: object, _envelope: object) -> None:
        pass

    world = World()
    with pytest.raises(ValueError, match=r"given twice: <class 'plexd\.mesh\.events\.ActionRequested'>"):
        world.dispatch.add({ActionRequested: handler})
