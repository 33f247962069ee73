"""A node, a peer on its mesh and a container behind it: three namespaces with stacks of their own, to hold talks in."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tests.linux.wires import run
from tests.namespaces import inside

MESH, BRIDGE = "plexd0", "docker0"
NODE = {4: "10.100.1.1", 6: "fd00:100::1"}
PEER = {4: "10.100.1.2", 6: "fd00:100::5"}
CONTAINER = {4: "172.30.0.2", 6: "fd00:30::2"}
_ROUTER = {4: "172.30.0.1", 6: "fd00:30::1"}
_MAC = {
    "node": "02:00:00:00:00:01",
    "peer": "02:00:00:00:00:02",
    "router": "02:00:00:00:00:03",
    "container": "02:00:00:00:00:04",
}
DEADLINE_SECONDS = 10.0
# what IPv6 says unasked on the mesh would be counted with what tests do
_SILENCE = f"""
table ip6 silence {{
  chain output {{ type filter hook output priority -20; oifname "{MESH}" icmpv6 type {{ 130-137, 143 }} drop; }}
}}
"""
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


class Homes:
    """Names of the namespaces: `node`, `peer`, `container`."""

    def __init__(self, make_namespace: Callable[[], str]) -> None:
        self.node, self.peer, self.container = (make_namespace() for _ in range(3))
        run("ip", "-n", self.node, "link", "add", MESH, "type", "veth", "peer", "name", MESH, "netns", self.peer)
        run(
            "ip",
            "-n",
            self.node,
            "link",
            "add",
            BRIDGE,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.container,
        )
        for namespace, link, mac, addresses in (
            (self.node, MESH, "node", NODE),
            (self.peer, MESH, "peer", PEER),
            (self.node, BRIDGE, "router", _ROUTER),
            (self.container, "eth0", "container", CONTAINER),
        ):
            run("ip", "-n", namespace, "link", "set", link, "address", _MAC[mac], "up")
            for version, address in addresses.items():
                bits = "24" if version == 4 else "64"
                extra = [] if version == 4 else ["nodad"]
                run("ip", "-n", namespace, "address", "add", f"{address}/{bits}", "dev", link, *extra)
        # a mesh interface asks nobody for link addresses, and the filter would not let it
        for namespace, link, mac, addresses in (
            (self.node, MESH, "peer", PEER),
            (self.peer, MESH, "node", NODE),
            (self.node, BRIDGE, "container", CONTAINER),
            (self.container, "eth0", "router", _ROUTER),
        ):
            for address in addresses.values():
                run("ip", "-n", namespace, "neighbour", "replace", address, "lladdr", _MAC[mac], "dev", link)
            with inside(namespace):
                run("nft", "-f", "-", stdin=_SILENCE)
        for version in (4, 6):
            for namespace, router in ((self.peer, NODE), (self.container, _ROUTER)):
                run("ip", "-n", namespace, f"-{version}", "route", "add", "default", "via", router[version])
        with inside(self.node):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1\n")
            Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1\n")

    def listen(self, namespace: str, address: str, port: int) -> socket.socket:
        with inside(namespace):
            return socket.create_server((address, port), family=_family(address))

    def udp(self, namespace: str, address: str, port: int) -> socket.socket:
        with inside(namespace):
            sock = socket.socket(_family(address), socket.SOCK_DGRAM)
            sock.bind((address, port))
            return sock

    def connect(self, namespace: str, address: str, port: int) -> socket.socket:
        with inside(namespace):
            return socket.create_connection((address, port), DEADLINE_SECONDS)

    def try_to_connect(self, namespace: str, address: str, port: int) -> socket.socket:
        """Begins, and does not wait for how it goes."""
        with inside(namespace):
            sock = socket.socket(_family(address), socket.SOCK_STREAM)
            sock.setblocking(False)
            sock.connect_ex((address, port))
            return sock

    def denied(self) -> int:
        """Packets dropped by the filter's last rule so far."""
        with inside(self.node):
            listed = json.loads(run("nft", "-j", "list", "chain", "inet", "plexd", "denied"))
        counters = (
            part["counter"]
            for item in listed["nftables"]
            if "rule" in item
            for part in item["rule"]["expr"]
            if "counter" in part
        )
        return sum(int(counter["packets"]) for counter in counters)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def _family(address: str) -> socket.AddressFamily:
    return _FAMILY[6 if ":" in address else 4]
