"""The control plane's own rules, without HTTP: membership, tokens, what nodes are told, what the state says."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.lab.controlplane.fleet import Fleet, Node, fresh_snapshot
from plexd.lab.controlplane.refusal import Refusal
from plexd.lab.controlplane.stream import Chunk, EventLog
from plexd.mesh.desired import SigningKeys
from plexd.mesh.keys import PrivateKey
from plexd.wire.envelope import Outcome, Verifier
from plexd.wire.sse import Decoder, Event


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def new_fleet(mesh: str = "10.100.0.0/16") -> tuple[Fleet, Clock]:
    clock = Clock()
    return Fleet(fresh_snapshot(mesh), clock), clock


def new_key() -> str:
    return str(PrivateKey.generate().public())


def join(fleet: Fleet, hostname: str) -> Node:
    answer = fleet.register(fleet.issue_token(), public_key=new_key(), hostname=hostname)
    return fleet.node(answer["node_id"])


def told(fleet: Fleet, node: Node) -> list[dict[str, Any]]:
    """All envelopes ever put on the node's stream."""
    items = Decoder().feed(b"".join(chunk.data for chunk in fleet.stream(node.id).since(0)))
    return [json.loads(item.data) for item in items if isinstance(item, Event)]


def types_told(fleet: Fleet, node: Node) -> list[str]:
    return [envelope["event_type"] for envelope in told(fleet, node)]


def refused(status: int) -> Any:
    return pytest.raises(Refusal, check=lambda exc: exc.status == status)


# --- membership ------------------------------------------------------------------------------------------------------


def test_token_is_good_once() -> None:
    fleet, _ = new_fleet()
    token = fleet.issue_token()
    fleet.register(token, public_key=new_key(), hostname="alpha")
    with refused(401):
        fleet.register(token, public_key=new_key(), hostname="beta")


def test_node_whose_answer_was_lost_gets_it_again() -> None:
    fleet, _ = new_fleet()
    token, key = fleet.issue_token(), new_key()
    first = fleet.register(token, public_key=key, hostname="alpha")
    assert fleet.register(token, public_key=key, hostname="alpha") == first
    assert len(fleet.nodes) == 1


def test_token_expires() -> None:
    fleet, clock = new_fleet()
    token = fleet.issue_token(lifetime=60)
    clock.now += 60
    with refused(401):
        fleet.register(token, public_key=new_key(), hostname="alpha")


def test_unknown_token_is_refused() -> None:
    fleet, _ = new_fleet()
    with refused(401):
        fleet.register("made-up", public_key=new_key(), hostname="alpha")


def test_host_name_and_key_are_unique_and_a_refusal_keeps_the_token() -> None:
    fleet, _ = new_fleet()
    alpha = join(fleet, "alpha")
    token = fleet.issue_token()
    with refused(409):
        fleet.register(token, public_key=new_key(), hostname="alpha")
    with refused(409):
        fleet.register(token, public_key=alpha.public_key, hostname="beta")
    assert fleet.register(token, public_key=new_key(), hostname="beta")


def test_revoked_node_is_replaced_by_its_successor() -> None:
    fleet, _ = new_fleet()
    alpha, beta = join(fleet, "alpha"), join(fleet, "beta")
    fleet.revoke(alpha.id)
    with refused(401):
        fleet.authenticate(alpha.node_key)
    successor = join(fleet, "alpha")
    assert successor.id != alpha.id
    assert types_told(fleet, beta) == ["peer_removed", "peer_added"]
    assert [peer["id"] for peer in fleet.state(beta)["peers"]] == [successor.id]


def test_key_of_a_node_that_left_is_told_from_an_unknown_one() -> None:
    fleet, _ = new_fleet()
    alpha = join(fleet, "alpha")
    fleet.remove(alpha.id)
    with refused(404):
        fleet.authenticate(alpha.node_key)
    with refused(401):
        fleet.authenticate("unknown")


def test_addresses_come_from_the_mesh_and_are_given_again() -> None:
    fleet, _ = new_fleet("10.9.8.0/30")
    alpha, beta = join(fleet, "alpha"), join(fleet, "beta")
    assert [alpha.mesh_ip, beta.mesh_ip] == ["10.9.8.1", "10.9.8.2"]
    with refused(403):
        join(fleet, "gamma")
    fleet.remove(alpha.id)
    assert join(fleet, "gamma").mesh_ip == "10.9.8.1"


@pytest.mark.parametrize("mesh", ["10.0.0.0/31", "10.0.0.1/16", "nonsense"])
def test_useless_mesh_is_refused(mesh: str) -> None:
    with pytest.raises(ValueError, match=r"mesh|does not appear|has host bits"):
        fresh_snapshot(mesh)


def test_mesh_may_be_ipv6() -> None:
    fleet, _ = new_fleet("fd00:1::/64")
    alpha, beta = join(fleet, "alpha"), join(fleet, "beta")
    assert fleet.state(alpha)["peers"][0]["allowed_ips"] == [f"{beta.mesh_ip}/128"]


# --- state and events ------------------------------------------------------------------------------------------------

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["join", "leave", "endpoint", "rotate"]), st.integers(0, 4)), max_size=25
)


@given(OPERATIONS)
def test_events_folded_one_by_one_give_what_the_state_says(operations: list[tuple[str, int]]) -> None:
    fleet, _ = new_fleet()
    witness = join(fleet, "witness")
    for step, (operation, who) in enumerate(operations):
        node = next((n for n in fleet.nodes.values() if n.hostname == f"h{who}"), None)
        if operation == "join" and node is None:
            join(fleet, f"h{who}")
        elif operation == "leave" and node is not None:
            fleet.remove(node.id)
        elif operation == "endpoint" and node is not None:
            fleet.report_endpoint(node, f"192.0.2.1:{1000 + step}", "none")
        elif operation == "rotate" and node is not None:
            fleet.rotate_key(node, new_key())
    peers: dict[str, dict[str, Any]] = {}
    for envelope in told(fleet, witness):
        payload = envelope["payload"]
        match envelope["event_type"]:
            case "peer_added":
                peers[payload["id"]] = payload
            case "peer_removed":
                del peers[payload["peer_id"]]
            case _:
                changed = {name: value for name, value in payload.items() if name != "peer_id"}
                peers[payload["peer_id"]] |= changed
    assert list(peers.values()) == fleet.state(witness)["peers"]


def test_both_ends_of_a_pair_share_a_key_of_their_own() -> None:
    fleet, _ = new_fleet()
    nodes = [join(fleet, name) for name in ("alpha", "beta", "gamma")]
    seen = {(node.id, peer["id"]): peer["psk"] for node in nodes for peer in fleet.state(node)["peers"]}
    assert all(seen[a, b] == seen[b, a] for a, b in seen)
    assert len(set(seen.values())) == 3


def test_rotation_may_be_asked_for_again_but_not_for_a_peers_key() -> None:
    fleet, _ = new_fleet()
    alpha, beta = join(fleet, "alpha"), join(fleet, "beta")
    key, before = new_key(), alpha.psks[beta.id]
    first = fleet.rotate_key(alpha, key)
    assert fleet.rotate_key(alpha, key) == first
    assert first["updated_peers"][0]["psk"] not in {"", before}
    assert types_told(fleet, beta) == ["peer_key_rotated"]
    with refused(409):
        fleet.rotate_key(alpha, beta.public_key)


def test_unchanged_or_unknown_endpoint_is_no_news() -> None:
    fleet, _ = new_fleet()
    alpha, beta = join(fleet, "alpha"), join(fleet, "beta")
    fleet.report_endpoint(beta, "192.0.2.2:51820", "none")
    answer = fleet.report_endpoint(alpha, "192.0.2.1:51820", "none")
    fleet.report_endpoint(alpha, "192.0.2.1:51820", "none")
    fleet.report_endpoint(alpha, "", "unknown")
    assert answer == {"peer_endpoints": [{"peer_id": beta.id, "endpoint": "192.0.2.2:51820"}]}
    assert types_told(fleet, beta) == ["peer_endpoint_changed"]
    assert alpha.endpoint == "192.0.2.1:51820"


def test_override_is_silent_until_asked_and_ends_with_null() -> None:
    fleet, _ = new_fleet()
    alpha, beta = join(fleet, "alpha"), join(fleet, "beta")
    before = types_told(fleet, alpha)
    fleet.patch_state(alpha.id, {"peers": [], "bridge_config": {"access_subnets": []}})
    assert (fleet.state(alpha)["peers"], types_told(fleet, alpha)) == ([], before)
    # what its own peers do is no longer this node's business
    fleet.report_endpoint(beta, "192.0.2.2:51820", "none")
    assert types_told(fleet, alpha) == before
    fleet.patch_state(alpha.id, {"peers": None, "bridge_config": None, "metadata": {"a": "b"}}, notify=True)
    assert types_told(fleet, alpha)[len(before) :] == ["peer_added", "node_state_updated", "bridge_config_updated"]
    assert [peer["id"] for peer in fleet.state(alpha)["peers"]] == [beta.id]
    with pytest.raises(KeyError, match="wishes"):
        fleet.patch_state(alpha.id, {"wishes": []})


def test_data_secrets_and_policies_are_announced_with_their_versions() -> None:
    fleet, _ = new_fleet()
    alpha = join(fleet, "alpha")
    for value in (1, 2):
        fleet.put_data(alpha.id, "k", {"n": value})
        fleet.put_secret(alpha.id, "s", b"x")
    fleet.set_policies([])
    assert types_told(fleet, alpha) == ["node_state_updated", "node_secrets_updated"] * 2 + ["policy_updated"]
    state = fleet.state(alpha)
    assert [(entry["key"], entry["payload"], entry["version"]) for entry in state["data"]] == [("k", {"n": 2}, 2)]
    assert (state["secret_refs"], state["policies"]) == ([{"key": "s", "version": 2}], [])


def test_rotated_signing_key_is_announced_under_the_old_one_and_the_old_one_ends() -> None:
    fleet, clock = new_fleet()
    alpha = join(fleet, "alpha")
    old = base64.b64decode(fleet.signing_public_key)
    fleet.rotate_signing_key(60)
    fleet.emit(alpha.id, "policy_updated", None)
    fleet.emit(alpha.id, "policy_updated", None, signer="previous")
    items = Decoder().feed(b"".join(chunk.data for chunk in fleet.stream(alpha.id).since(0)))
    texts = [item.data for item in items if isinstance(item, Event)]
    verifier = Verifier(SigningKeys(old))
    assert verifier.verify(texts[0], now=clock.now, monotonic=0).outcome is Outcome.VERIFIED
    keys = json.loads(texts[0])["payload"]
    assert keys == fleet.state(alpha)["signing_keys"]
    verifier.replace_keys(SigningKeys(base64.b64decode(keys["current"]), old, clock.now + 60))
    assert [verifier.verify(text, now=clock.now, monotonic=0).outcome for text in texts[1:]] == [Outcome.VERIFIED] * 2
    clock.now += 60
    assert fleet.state(alpha)["signing_keys"] == {"current": keys["current"]}


def test_heartbeat_flags_are_given_once() -> None:
    fleet, _ = new_fleet()
    alpha = join(fleet, "alpha")
    fleet.ask(alpha.id, reconcile=True)
    fleet.ask(alpha.id, rotate_keys=True)
    assert fleet.heartbeat(alpha) == {"reconcile": True, "rotate_keys": True}
    assert fleet.heartbeat(alpha) == {"reconcile": False, "rotate_keys": False}


def test_execution_is_acknowledged_then_finished_once() -> None:
    fleet, _ = new_fleet()
    alpha = join(fleet, "alpha")
    with refused(404):
        fleet.acknowledge(alpha, "e1", "accepted")
    fleet.emit(alpha.id, "action_request", {"execution_id": "e1", "action": "ping"})
    fleet.acknowledge(alpha, "e1", "accepted")
    fleet.acknowledge(alpha, "e1", "accepted")
    fleet.finish(alpha, "e1", "success")
    with refused(409):
        fleet.finish(alpha, "e1", "failed")
    with refused(409):
        fleet.acknowledge(alpha, "e1", "rejected")


def test_older_report_is_a_conflict_and_nothing_of_the_batch_is_taken() -> None:
    fleet, _ = new_fleet()
    alpha = join(fleet, "alpha")

    def entry(key: str, version: int) -> dict[str, Any]:
        return {"key": key, "version": version, "payload": version}

    fleet.sync_reports(alpha, [entry("a", 5)], [])
    fleet.sync_reports(alpha, [entry("a", 5)], [])  # its first answer was lost
    with pytest.raises(Refusal) as caught:
        fleet.sync_reports(alpha, [entry("b", 1), entry("a", 4)], [])
    assert (caught.value.status, caught.value.details) == (409, {"conflicts": [{"key": "a", "version": 5}]})
    assert list(alpha.reports) == ["a"]
    fleet.sync_reports(alpha, [entry("b", 1)], ["a", "never there"])
    assert list(alpha.reports) == ["b"]


def test_secrets_of_a_node_are_in_no_repr() -> None:
    fleet, _ = new_fleet()
    alpha, beta = join(fleet, "alpha"), join(fleet, "beta")
    fleet.put_secret(alpha.id, "s", b"hush")
    token = fleet.issue_token()
    said = repr(fleet.snapshot)
    for secret in (
        alpha.node_key,
        alpha.psks[beta.id],
        token,
        fleet.snapshot.signing.current,
        alpha.secrets["s"].value,
    ):
        assert secret not in said


# --- the stream ------------------------------------------------------------------------------------------------------


def test_replay_begins_after_the_event_named_and_leaves_out_what_has_no_id() -> None:
    stream = EventLog()
    for chunk in (Chunk(b"1", "1"), Chunk(b"noise"), Chunk(b"2", "2"), Chunk(b"", ends=True), Chunk(b"3", "3")):
        stream.append(chunk)
    assert [chunk.data for chunk in stream.replay("1")] == [b"2", b"3"]
    assert stream.replay("3") == []
    assert stream.replay("unknown") == []


def test_reader_that_fell_behind_gets_what_is_still_kept() -> None:
    stream = EventLog()
    for number in range(1500):
        stream.append(Chunk(b"%d" % number, str(number)))
    assert [chunk.data for chunk in stream.since(1498)] == [b"1498", b"1499"]
    assert stream.since(0)[0].data == b"500"
    assert stream.since(stream.end) == []
