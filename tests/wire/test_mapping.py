from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import SecretStr

from plexd.errors import WireError
from plexd.mesh.address import Prefix
from plexd.mesh.desired import DataEntry, Desired, EndpointSource, FullState, Policy, PolicyRule, Rejection, SigningKeys
from plexd.mesh.events import EndpointOffered
from plexd.mesh.keys import NO_PRESHARED_KEY, PresharedKey, PublicKey
from plexd.wire import models
from plexd.wire.mapping import (
    OwnNode,
    PeerRejected,
    Registered,
    map_endpoints,
    map_peer,
    map_peers,
    map_registration,
    map_signing_keys,
    map_state,
)
from plexd.wire.reading import Skipped, read

NOW = 1772366400.0  # 2026-03-01T12:00:00Z


def key(number: int) -> str:
    return base64.b64encode(number.to_bytes(32, "big")).decode()


OWN = OwnNode("n_own", bytes([10, 100, 0, 1]), PublicKey.parse(key(1)))


def peer(number: int, **members: Any) -> dict[str, Any]:
    return {
        "id": f"n_{number}",
        "public_key": key(number),
        "mesh_ip": f"10.100.0.{number}",
        "endpoint": "198.51.100.7:51820",
        "allowed_ips": [f"10.100.0.{number}/32"],
        "psk": "",
        **members,
    }


def wire_peer(number: int, **members: Any) -> models.Peer:
    return read(models.Peer, json.dumps(peer(number, **members)))[0]


def state(document: Mapping[str, Any], held: Desired | None = None) -> tuple[FullState, tuple[Skipped, ...]]:
    wire, faults = read(models.StateResponse, json.dumps(document))
    return map_state(wire, faults, own=OWN, held=held or Desired(), now=NOW)


def test_peer_is_taken_over() -> None:
    mapped, skipped = map_peer(wire_peer(2, psk=key(9), allowed_ips=["10.1.2.3/8", "10.100.0.2", "fd00::2"]), OWN)
    assert mapped.id == "n_2"
    assert str(mapped.public_key) == key(2)
    assert mapped.mesh_ip == bytes([10, 100, 0, 2])
    assert mapped.endpoint == "198.51.100.7:51820"
    assert list(map(str, mapped.allowed_ips)) == ["10.100.0.2/32", "10.0.0.0/8", "fd00::2/128"]
    assert mapped.psk == PresharedKey.parse(key(9))
    assert not skipped


def test_peer_without_psk_has_none_and_its_address_is_enough() -> None:
    mapped, _ = map_peer(wire_peer(2, allowed_ips=None, mesh_ip="10.100.0.2/16", endpoint=""), OWN)
    assert mapped.psk == NO_PRESHARED_KEY
    assert mapped.allowed_ips == (Prefix.parse("10.100.0.2/32"),)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"id": ""}, "id is missing"),
        ({"public_key": ""}, "bad public key"),
        ({"public_key": key(2)[:-1]}, "bad public key"),
        ({"public_key": key(2).rstrip("=")}, "bad public key"),
        ({"public_key": "*" * 44}, "bad public key"),
        ({"public_key": key(2)[:-2] + "J="}, "bad public key: base64 is not canonical"),
        ({"public_key": key(0)}, "bad public key: all zero"),
        ({"public_key": key(1)}, "public key is our own"),
        ({"psk": "short"}, "bad preshared key"),
        ({"psk": " " + key(3)}, "bad preshared key"),
        ({"mesh_ip": "10.100.0"}, "mesh_ip is not an IP address"),
        ({"mesh_ip": "10.100.0.02"}, "mesh_ip is not an IP address"),
        ({"mesh_ip": "", "allowed_ips": []}, "neither mesh_ip nor allowed_ips"),
        ({"mesh_ip": "127.0.0.1", "allowed_ips": ["0.0.0.0/0"]}, "neither mesh_ip nor allowed_ips"),
    ],
)
def test_peer_that_cannot_be_used_is_rejected_without_its_keys_in_the_reason(
    members: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PeerRejected) as caught:
        map_peer(wire_peer(2, **members), OWN)
    assert str(caught.value).startswith(reason)
    for name in ("public_key", "psk"):
        assert not members.get(name) or members[name] not in str(caught.value)


@pytest.mark.parametrize(
    "prefix",
    ["0.0.0.0/0", "::/0", "127.0.0.0/8", "127.3.0.0/16", "169.254.1.0/24", "224.0.0.5", "239.0.0.0/8", "0.0.0.0",
     "::", "::1", "fe80::/10", "fe80::5", "febf::/16", "ff02::1", "10.100.0.1", "10.100.0.1/32", "nonsense",
     "10.0.0.0/33", "10.0/16", "10.0.0.0/255.0.0.0", "fe80::1%eth0/64", ""],
)  # fmt: skip
def test_prefix_no_peer_may_have_is_dropped_and_the_peer_stays(prefix: str) -> None:
    mapped, skipped = map_peer(wire_peer(2, allowed_ips=[prefix, "192.0.2.0/24"]), OWN)
    assert list(map(str, mapped.allowed_ips)) == ["10.100.0.2/32", "192.0.2.0/24"]
    assert [(fault.path, fault.id) for fault in skipped] == [("allowed_ips", "n_2")]


@pytest.mark.parametrize(
    "prefix", ["0.0.0.0/1", "128.0.0.0/1", "10.100.0.0/16", "126.0.0.0/7", "fec0::/10", "::/1", "169.253.0.0/16"]
)
def test_prefix_that_only_contains_such_ranges_is_kept(prefix: str) -> None:
    mapped, skipped = map_peer(wire_peer(2, allowed_ips=[prefix]), OWN)
    assert str(mapped.allowed_ips[-1]) == prefix
    assert not skipped


def test_own_entry_is_ignored_and_one_bad_peer_costs_no_other() -> None:
    full, skipped = state({"peers": [peer(2), peer(3, public_key="x"), peer(1, id="n_own"), peer(4)], "policies": []})
    assert full.peers is not None
    assert [p.id for p in full.peers] == ["n_2", "n_4"]
    assert full.rejected == (Rejection("n_3", "bad public key: not standard base64"),)
    assert not skipped


def test_last_of_equal_ids_and_first_of_equal_keys_count() -> None:
    full, _ = state(
        {"peers": [peer(2), peer(3), peer(2, mesh_ip="10.100.0.22"), peer(4, public_key=key(3))], "policies": []}
    )
    assert full.peers is not None
    assert [(p.id, p.mesh_ip[-1]) for p in full.peers] == [("n_3", 3), ("n_2", 22)]
    assert full.rejected == (Rejection("n_4", "has the public key of peer n_3"),)


def test_peer_that_could_not_be_read_is_rejected_by_its_id() -> None:
    full, skipped = state({"peers": [peer(2, psk=5), peer(3, allowed_ips=["10.9.0.0/16", 5]), {"psk": 5}, peer(4)]})
    assert full.peers is not None
    assert [p.id for p in full.peers] == ["n_3", "n_4"]
    assert full.rejected == (Rejection("n_2", "psk should be a valid string"),)
    assert [fault.path for fault in skipped][:3] == ["peers[0]", "peers[1].allowed_ips[1]", "peers[2]"]


def test_peers_without_id_are_skipped() -> None:
    assert map_peers([wire_peer(2, id="")], (), OWN, "updated_peers").skipped == (
        Skipped("updated_peers", "", "id is missing"),
    )


def test_missing_categories_are_no_statement_and_null_is_the_empty_list() -> None:
    full, skipped = state({})
    assert (full.peers, full.policies, full.signing_keys) == (None, None, None)
    assert (full.metadata, full.data, full.secret_refs, full.configs) == ({}, {}, {}, {})
    assert [fault.path for fault in skipped] == ["peers", "policies"]
    full, skipped = state({"peers": None, "policies": None})
    assert (full.peers, full.policies, full.rejected, skipped) == ((), (), (), ())


def test_state_is_taken_over() -> None:
    full, skipped = state(
        {
            "peers": [peer(2)],
            "policies": [
                {"id": "p", "rules": [{"src": "*", "dst": "n_2", "port": 443, "protocol": "tcp", "action": "allow"}]},
                {"id": "q", "rules": None},
                {"id": "p", "rules": [{"src": "n_2", "port": "x", "action": "deny"}]},
            ],
            "signing_keys": {"current": key(5)},
            "metadata": {"a": "b"},
            "data": [
                {"key": "k", "content_type": "application/json", "payload": {"n": 1.0}, "version": 2,
                 "updated_at": "2026-03-01T13:00:00.120+01:00"},
                {"key": "k", "payload": None, "version": 1},
                {"key": "a/b", "version": 1},
                {"key": ""}, {"key": "x\n"}, {"key": "ü" * 127},
            ],
            "secret_refs": [{"key": "s", "version": 1}, {"key": "s", "version": 2}, {"key": ""}],
            "bridge_config": {"access_subnets": ["10.9.0.0/16"]},
            "relay_config": None,
            "site_to_site_config": {"enabled": True, "tunnels": [{"tunnel_id": "t", "psk": "geheim", "x": 1}]},
        }
    )  # fmt: skip
    assert full.policies == (
        Policy("q", ()),
        Policy("p", (PolicyRule("n_2", "", -1, "", "deny"),)),
    )
    assert full.signing_keys == SigningKeys(bytes(31) + b"\x05")
    assert full.metadata == {"a": "b"}
    assert full.data == {"k": DataEntry("k", "", "null", 1, ""), "a/b": DataEntry("a/b", "", "null", 1, "")}
    assert full.secret_refs == {"s": 2}
    assert list(full.configs) == ["bridge_config", "site_to_site_config"]
    assert json.loads(full.configs["bridge_config"]) == {"access_subnets": ["10.9.0.0/16"], "enable_forwarding": True}
    assert json.loads(full.configs["site_to_site_config"])["tunnels"][0]["psk"] == "geheim"
    assert [fault.path for fault in skipped] == ["data", "data", "data", "secret_refs"]


def test_held_policy_keeps_its_place_behind_a_damaged_one_that_is_not_held() -> None:
    """A deny that slipped behind an allow would grant what it forbids."""
    held = Desired(policies=(Policy("deny", (PolicyRule("*", "*", 22, "tcp", "deny"),)),))
    policies = [
        {"id": "unknown", "rules": 5},
        {"id": "a", "rules": []},
        {"id": "deny", "rules": 5},
        {"id": "allow", "rules": [{"src": "*", "dst": "*", "port": 0, "protocol": "", "action": "allow"}]},
    ]
    full, _ = state({"peers": [], "policies": policies}, held)
    assert full.policies is not None
    assert [policy.id for policy in full.policies] == ["a", "deny", "allow"]


def test_damaged_entry_that_is_already_held_stays_as_it_is() -> None:
    held = Desired(
        policies=(Policy("p1", ()), Policy("p2", (PolicyRule("*", "*", 0, "", "deny"),))),
        data={"k": DataEntry("k", "", '"held"', 3, "")},
        secret_refs={"s": 7},
    )
    full, skipped = state(
        {
            "peers": [],
            "policies": [{"id": "p0"}, {"id": "p2", "rules": 5}, {"id": "p3"}, {"id": "px", "rules": 5}],
            "data": [{"key": "k", "version": "4"}, {"key": "l", "version": "4"}, {"key": "m"}],
            "secret_refs": [{"key": "s", "version": None}, {"key": "s", "version": []}],
        },
        held,
    )
    assert full.policies == (Policy("p0", ()), held.policies[1], Policy("p3", ()))
    assert set(full.data) == {"k", "m"}
    assert full.data["k"] == held.data["k"]
    assert full.secret_refs == {"s": 0}
    assert len(skipped) == 5


@pytest.mark.parametrize(
    ("members", "previous", "until", "warned"),
    [
        ({}, None, 0.0, False),
        ({"previous": key(6)}, None, 0.0, False),
        ({"previous": key(6), "transition_expires": "2026-03-01T12:00:00Z"}, None, 0.0, False),
        ({"previous": key(6), "transition_expires": "2026-03-01T12:00:01Z"}, 6, NOW + 1, False),
        ({"previous": key(5), "transition_expires": "2026-03-01T12:00:01Z"}, None, 0.0, False),
        ({"previous": None, "transition_expires": "2026-03-01T12:00:01Z"}, None, 0.0, False),
        ({"previous": key(6), "transition_expires": "0001-01-01T00:00:00Z"}, None, 0.0, False),
        ({"previous": key(6), "transition_expires": "soon"}, None, 0.0, True),
        ({"previous": "x", "transition_expires": "2026-03-01T12:00:01Z"}, None, 0.0, True),
    ],
)
def test_previous_signing_key_counts_only_with_an_end_to_come(
    members: dict[str, Any], previous: int | None, until: float, warned: bool
) -> None:
    wire, _ = read(models.SigningKeys, json.dumps({"current": key(5), **members}))
    keys, skipped = map_signing_keys(wire, NOW)
    assert keys == SigningKeys((5).to_bytes(32, "big"), previous and previous.to_bytes(32, "big"), until)  # type: ignore[arg-type]
    assert bool(skipped) == warned


@pytest.mark.parametrize("current", ["", None, "x", key(5)[:-1], base64.b64encode(bytes(31)).decode()])
def test_set_without_a_current_key_leaves_the_keys_in_force(current: str | None) -> None:
    full, skipped = state({"peers": [], "policies": [], "signing_keys": {"current": current, "previous": key(6)}})
    assert full.signing_keys is None
    assert [fault.path for fault in skipped] == ["signing_keys"]


def test_endpoints_offered_leave_out_the_empty_and_our_own() -> None:
    wire, _ = read(
        models.EndpointResponse,
        '{"peer_endpoints":[{"peer_id":"a","endpoint":"192.0.2.1:1"},{"peer_id":"b"},{"peer_id":"","endpoint":"x:1"},'
        '{"peer_id":"n_own","endpoint":"192.0.2.1:1"}]}',
    )
    assert map_endpoints(wire, OWN) == (EndpointOffered("a", "192.0.2.1:1", EndpointSource.REPORT),)


def register(**members: Any) -> tuple[Registered, tuple[Skipped, ...]]:
    answer = {"node_id": "n_own", "mesh_ip": "10.100.0.1/16", "signing_public_key": key(5), "node_secret_key": key(7),
              "peers": [peer(2), peer(1, id="n_own"), peer(3, psk="x")], **members}  # fmt: skip
    wire, faults = read(models.RegisterResponse, json.dumps(answer))
    return map_registration(wire, faults, OWN.public_key)


def test_registration_is_taken_over() -> None:
    registered, skipped = register()
    assert registered[:4] == ("n_own", OWN.mesh_ip, SecretStr(key(7)), SigningKeys((5).to_bytes(32, "big")))
    assert [p.id for p in registered.peers] == ["n_2"]
    assert [r.peer_id for r in registered.rejected] == ["n_3"]
    assert not skipped
    assert key(7) not in repr(registered)


@pytest.mark.parametrize(
    ("members", "path"),
    [
        ({"signing_public_key": ""}, "signing_public_key"),
        ({"signing_public_key": "x"}, "signing_public_key"),
        ({"node_secret_key": "not-base64"}, "node_secret_key"),
    ],
)
def test_registration_with_a_minor_fault_is_kept(members: dict[str, Any], path: str) -> None:
    registered, skipped = register(**members)
    assert (registered.signing_keys is None) == (path == "signing_public_key")
    assert [fault.path for fault in skipped] == [path]


@pytest.mark.parametrize(
    "members",
    [{"node_id": ""}, {"node_id": None}, {"node_id": ".."}, {"node_id": "x\n"}, {"mesh_ip": ""}, {"mesh_ip": "host"},
     {"node_secret_key": ""}, {"node_secret_key": None}, {"node_secret_key": "a b"}, {"node_secret_key": "x" * 513}],
)  # fmt: skip
def test_registration_with_an_unusable_member_names_it(members: dict[str, Any]) -> None:
    with pytest.raises(WireError, match=rf"^{next(iter(members))} in the answer is "):
        register(**members)
