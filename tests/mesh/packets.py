"""Packets as the filter sees them, and a strategy of those that policies of the small mesh may care about."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from hypothesis import strategies as st

Address = IPv4Address | IPv6Address

TCP, UDP, ICMP, ICMPV6, GRE = 6, 17, 1, 58, 47


@dataclass(frozen=True)
class Packet:
    """`src` to `port` are the original tuple of its connection; `header_dst` is where it goes now.

    `state` is that of connection tracking; "established" has a `direction`. A "related" packet whose
    connection is not `confirmed` is one that a conntrack helper expects.
    """

    hook: str
    iifname: str
    oifname: str
    src: Address
    dst: Address
    l4proto: int
    port: int
    state: str = "new"
    direction: str = "original"
    header_dst: Address | None = None
    icmp_type: str = ""
    confirmed: bool = True

    @property
    def to(self) -> Address:
        return self.header_dst or self.dst


ADDRESSES = {
    4: tuple(
        map(
            ip_address,
            (
                "10.100.1.1", "10.100.1.2", "10.100.1.3", "10.100.1.7", "10.100.2.4", "172.16.7.9", "172.16.8.1",
                "192.0.2.7", "198.51.100.1",
            ),
        )
    ),
    6: tuple(map(ip_address, ("fd00:100::1", "fd00:100::5", "fd00:100::6", "fd00:200::1", "2001:db8::1"))),
}  # fmt: skip
PORTS = (22, 80, 443, 65535, 8080)
MANAGED = ("plexd0", "plexd-s2s")
INTERFACES = ("lo", "eth0", *MANAGED)


@st.composite
def packets(draw: st.DrawFn) -> Packet:
    family = draw(st.sampled_from((4, 4, 6)))
    addresses = st.sampled_from(ADDRESSES[family])
    l4proto = draw(st.sampled_from((TCP, TCP, UDP, ICMP if family == 4 else ICMPV6, GRE)))
    is_icmp = l4proto in {ICMP, ICMPV6}
    hook = draw(st.sampled_from(("input", "output", "forward")))
    state = draw(
        st.sampled_from(("new", "new", "new", "established", "established", "related", "invalid", "untracked"))
    )
    return Packet(
        hook=hook,
        iifname="" if hook == "output" else draw(st.sampled_from(INTERFACES)),
        oifname="" if hook == "input" else draw(st.sampled_from(INTERFACES)),
        src=draw(addresses),
        dst=draw(addresses),
        l4proto=l4proto,
        port=draw(st.sampled_from(PORTS)) if l4proto in {TCP, UDP} else 0,
        state=state,
        direction=draw(st.sampled_from(("original", "reply"))) if state == "established" else "original",
        header_dst=draw(st.one_of(st.none(), addresses)),
        icmp_type=draw(st.sampled_from(("echo-request", "echo-reply", "destination-unreachable"))) if is_icmp else "",
        confirmed=draw(st.booleans()) if state == "related" else True,
    )
