"""A node between the mesh and a network of its own, with packets put onto either wire by hand.

The far ends of the wires have no address and answer nothing. What passes the filter is seen right behind it, by a
table that remembers the number each packet carries.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from pathlib import Path

from tests.mesh.packets import ICMP, ICMPV6, TCP, UDP, Address, Packet
from tests.namespaces import inside

MESH, OUTSIDE, NODE = "plexd0", "eth0", ""
NODE_MAC, FAR_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"
OWN_ADDRESSES = tuple(map(ip_address, ("10.100.1.1", "198.51.100.1", "fd00:100::1", "2001:db8::1")))
ROUTES = {
    MESH: tuple(map(ip_network, ("10.100.0.0/16", "172.16.0.0/12", "fd00:100::/32", "fd00:200::/32"))),
    OUTSIDE: tuple(map(ip_network, ("192.0.2.0/24", "2001:db8:7::/48"))),
}
_ROUTERS = {4: "169.254.0.1", 6: "fe80::f"}
PATIENCE_SECONDS = 20.0
_HOPS = 77  # tells our packets from what the node answers; one less when they were forwarded
_ETHERTYPES = {4: 0x0800, 6: 0x86DD}
_IPV6_HDRINCL = 36
_PROBE = """
table inet probe {
  counter come { }
  set seen { typeof ip id; size 65535; flags dynamic; }
  set seen6 { typeof ip6 flowlabel; size 65535; flags dynamic; }
  chain see {
    ip ttl { 76, 77 } add @seen { ip id }
    ip6 hoplimit { 76, 77 } add @seen6 { ip6 flowlabel }
  }
  chain arrivals {
    type filter hook prerouting priority raw
    ip ttl 77 counter name come
    ip6 hoplimit 77 counter name come
  }
  chain answers { type filter hook output priority -20; ip ttl != 77 drop; ip6 hoplimit != 77 drop; }
  chain input { type filter hook input priority 0; jump see; }
  chain output { type filter hook output priority 0; jump see; }
  chain forward { type filter hook forward priority 0; jump see; }
}
"""


def run(*command: str, stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, text=True, capture_output=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


class Wires:
    """`node` is the name of the node's namespace; everything is undone with the namespaces."""

    def __init__(self, make_namespace: Callable[[], str]) -> None:
        self.node = make_namespace()
        self._put_on_wires = 0
        self._sources = itertools.count(1024)
        self._far: dict[str, socket.socket] = {}
        with inside(self.node):
            _switch_on_forwarding()
            for interface in (MESH, OUTSIDE):
                far = make_namespace()
                _lay(interface, far)
                self._far[interface] = _open_far_end(far)
            for address in OWN_ADDRESSES:
                run("ip", "address", "add", str(address), "dev", MESH, *(["nodad"] if address.version == 6 else []))
            for interface, networks in ROUTES.items():
                for network in networks:
                    way = ("via", _ROUTERS[network.version], "dev", interface, "onlink")
                    run("ip", f"-{network.version}", "route", "add", str(network), *way)
            run("nft", "-f", "-", stdin=_PROBE)
            self._raw = {
                4: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW),
                6: socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW),
            }
            self._raw[6].setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)

    def close(self) -> None:
        for sock in (*self._far.values(), *self._raw.values()):
            sock.close()

    def send(self, packet: Packet, number: int) -> None:
        """Into the interface it comes from, or out of the node itself. Nothing is known of its connection before."""
        data = build(packet, number, next(self._sources) % 60000 + 1024)
        if packet.iifname:
            ether = bytes.fromhex((NODE_MAC + FAR_MAC).replace(":", "")) + struct.pack(
                "!H", _ETHERTYPES[packet.src.version]
            )
            self._far[packet.iifname].send(ether + data)
            self._put_on_wires += 1
            return
        with contextlib.suppress(PermissionError):  # how a drop is told to the sender
            self._raw[packet.src.version].sendto(data, (str(packet.dst), 0))

    def wait_until_taken(self) -> None:
        """A busy kernel takes packets off a wire later than they were put onto it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (come := self._come()) < self._put_on_wires:
            assert time.monotonic() < deadline, f"{come} of {self._put_on_wires} packets came"
            time.sleep(0.01)

    def _come(self) -> int:
        with inside(self.node):
            listed = json.loads(run("nft", "-j", "list", "counter", "inet", "probe", "come"))
        return int(listed["nftables"][1]["counter"]["packets"])

    def passed(self) -> set[int]:
        """The numbers of the packets that got past the filter since the last time."""
        with inside(self.node):
            found = set()
            for name in ("seen", "seen6"):
                listed = json.loads(run("nft", "-j", "list", "set", "inet", "probe", name))
                found |= set(listed["nftables"][1]["set"].get("elem", ()))
                run("nft", "flush", "set", "inet", "probe", name)
            return found


def arrive(entry: str, src: Address, dst: Address) -> tuple[str, str, str] | None:
    """Hook and interfaces of a packet that comes in at `entry`; None for one that the node would not have."""
    is_own = dst in OWN_ADDRESSES
    if (is_own and entry == NODE) or (src in OWN_ADDRESSES and entry != NODE):
        return None
    if is_own:
        return "input", entry, ""
    out = next(interface for interface, networks in ROUTES.items() if any(dst in network for network in networks))
    return ("output", "", out) if entry == NODE else ("forward", entry, out)


def build(packet: Packet, number: int, source_port: int) -> bytes:
    """The packet with its number, the first of a connection of its own."""
    payload = _transport(packet, source_port)
    ends = packet.src.packed + packet.dst.packed
    if packet.src.version == 6:
        return struct.pack("!IHBB", 0x60000000 | number, len(payload), packet.l4proto, _HOPS) + ends + payload
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), number, 0, _HOPS, packet.l4proto, 0) + ends
    return header[:10] + _checksum(header) + header[12:] + payload


def _transport(packet: Packet, source_port: int) -> bytes:
    ends = packet.src.packed + packet.dst.packed
    if packet.l4proto == TCP:
        data = struct.pack("!HHIIHHHH", source_port, packet.port, source_port, 0, 5 << 12 | 0x02, 1024, 0, 0)
        place = 16
    elif packet.l4proto == UDP:
        data = struct.pack("!HHHH", source_port, packet.port, 8, 0)
        place = 6
    else:
        kind = {"echo-request": (8, 128), "echo-reply": (0, 129)}[packet.icmp_type][packet.l4proto == ICMPV6]
        data = struct.pack("!BBHHH", kind, 0, 0, source_port, 1)
        place = 2
    pseudo = b"" if packet.l4proto == ICMP else ends + struct.pack("!IBBBB", len(data), 0, 0, 0, packet.l4proto)
    return data[:place] + _checksum(pseudo + data) + data[place + 2 :]


def _checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF or 0xFFFF)


def _switch_on_forwarding() -> None:
    settings = {
        "ipv4/ip_forward": "1",
        "ipv4/conf/all/rp_filter": "0",
        "ipv4/conf/default/rp_filter": "0",
        "ipv4/conf/default/send_redirects": "0",
        "ipv4/conf/all/send_redirects": "0",
        "ipv6/conf/all/forwarding": "1",
        "ipv6/conf/default/accept_dad": "0",
    }
    for name, value in settings.items():
        Path("/proc/sys/net", name).write_text(f"{value}\n")


def _open_far_end(namespace: str) -> socket.socket:
    with inside(namespace):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        sock.bind(("far", 0))
        return sock


def _lay(interface: str, far: str) -> None:
    """A wire from here to another namespace; whom to ask for routes out of it is known."""
    run("ip", "link", "add", interface, "type", "veth", "peer", "name", "far", "netns", far)
    run("ip", "link", "set", interface, "address", NODE_MAC, "up")
    run("ip", "-n", far, "link", "set", "far", "address", FAR_MAC, "up")
    for router in _ROUTERS.values():
        run("ip", "neighbour", "add", router, "lladdr", FAR_MAC, "nud", "permanent", "dev", interface)
