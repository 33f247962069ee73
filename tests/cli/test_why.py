"""`plexd why` in words."""

from __future__ import annotations

from typing import Any

from plexd.cli.why import why_lines

NOW = 1_800_000_000.0
PEER: dict[str, Any] = {
    "id": "n_9c20", "mesh_ip": "10.100.0.3", "public_key": "k", "endpoint": "192.0.2.3:51820",
    "endpoint_source": "report", "path": "direct", "allowed_ips": ["10.100.0.3/32"],
    "last_handshake_at": "2027-01-15T07:59:48Z", "rx_bytes": 2048, "tx_bytes": 812, "psk_set": True,
    "connected": True, "obstacle": None,
    "candidates": [
        {"endpoint": "192.0.2.3:51820", "source": "report", "resolved": "192.0.2.3:51820"},
        {"endpoint": "gate.example.net:51820", "source": "state", "resolved": "192.0.2.9:51820"},
    ],
    "node": {
        "nat": {"public_endpoint": "198.51.100.9:51820", "type": "full_cone"}, "mtu": 1420, "policy": None,
        "state_fetched_at": "2027-01-15T07:59:26Z", "generation": 57,
    },
}  # fmt: skip
OBSTACLE = {
    "code": "no_handshake",
    "text": "never a handshake with 192.0.2.3:51820 for 12s: 812 bytes sent, 0 received",
    "remedy": "check that the peer runs, knows this node, and that UDP passes from port 51820 here to its endpoint",
}


def test_connected_peer() -> None:
    assert list(why_lines(PEER, NOW, None)) == [
        "Peer:         n_9c20 (10.100.0.3)",
        "Connected:    yes",
        "Path:         direct to 192.0.2.3:51820 (report)",
        "Handshake:    12s ago; 812B sent, 2.0KiB received",
        "Endpoints:    192.0.2.3:51820 (from report)",
        "              gate.example.net:51820 = 192.0.2.9:51820 (from state)",
        "This node:    198.51.100.9:51820, NAT full_cone",
        "MTU:          1420",
        "Policy:       not enforced",
        "State:        fetched 34s ago, 57 events since the start",
        "",
        "connected",
    ]


def test_peer_that_is_not_connected_ends_with_reason_and_remedy() -> None:
    node = {"nat": None, "mtu": None, "policy": None, "state_fetched_at": None, "generation": 0}
    peer = PEER | {
        "connected": False, "endpoint": None, "last_handshake_at": None, "mesh_ip": None, "candidates": [],
        "node": node, "obstacle": OBSTACLE,
    }  # fmt: skip
    lines = list(why_lines(peer, NOW, None))
    assert lines[-2:] == [f"no_handshake: {OBSTACLE['text']}", f"  {OBSTACLE['remedy']}"]
    assert "Path:         none" in lines
    assert "Handshake:    never; 812B sent, 2.0KiB received" in lines


def test_narrow_terminal_is_not_overrun() -> None:
    lines = list(why_lines(PEER | {"connected": False, "obstacle": OBSTACLE}, NOW, 60))
    assert max(map(len, lines)) <= 60
    assert lines[-4:] == [
        "no_handshake: never a handshake with 192.0.2.3:51820 for",
        "  12s: 812 bytes sent, 0 received",
        "  check that the peer runs, knows this node, and that UDP",
        "  passes from port 51820 here to its endpoint",
    ]


def rule(number: int, action: str = "allow", protocol: str = "any", port: int = 0, packets: int | None = 7) -> Any:
    return {
        "policy": "web", "rule": number, "action": action, "protocol": protocol, "port": port, "packets": packets
    }  # fmt: skip


def test_policy_is_told_for_each_direction() -> None:
    inward = [rule(0, protocol="tcp", port=443), rule(2, "deny", packets=None)]
    node = PEER["node"] | {"policy": {"default": "deny", "inward": inward, "outward": [rule(1, protocol="icmp")]}}
    lines = list(why_lines(PEER | {"node": node}, NOW, None))
    assert "From it:      allow tcp port 443 (policy web rule 0, 7 packets); deny all (policy web rule 2)" in lines
    assert "To it:        allow icmp (policy web rule 1, 7 packets); else deny" in lines
    node = PEER["node"] | {
        "policy": {"default": "deny", "inward": [], "outward": [rule(n, port=n) for n in range(1, 9)]}
    }
    lines = list(why_lines(PEER | {"node": node}, NOW, None))
    assert "From it:      deny, by default" in lines
    assert any("; 3 more rules; else deny" in line for line in lines)
