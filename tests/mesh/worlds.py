"""Small worlds to plan in: a few peers that get in each other's way, and kernels in any state people leave them in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from hypothesis import strategies as st

from plexd.mesh.address import Endpoint, Prefix, parse_ip
from plexd.mesh.desired import Candidates, Desired, EndpointSource, Peer
from plexd.mesh.keys import NO_PRESHARED_KEY, PresharedKey, PrivateKey, PublicKey
from plexd.mesh.observed import ROUTE_METRIC, Backend, DevicePeer, Route
from plexd.mesh.plan import plan
from plexd.mesh.target import Settings, Target, build_target
from tests.fakes import FakeKernel

NOW = 1_800_000_000.0
OWN_KEY = PrivateKey(bytes([8] * 32))
OTHER_KEY = PrivateKey(bytes([16] * 32))
OWN_IP = parse_ip("10.100.0.1")
OWN_IPV6 = parse_ip("fd00:100::1")
KEYS = tuple(PublicKey(bytes([n] * 32)) for n in range(1, 7))
PSKS = (NO_PRESHARED_KEY, PresharedKey(bytes([0xA1] * 32)), PresharedKey(bytes([0xA2] * 32)))
PREFIXES = tuple(
    map(
        Prefix.parse,
        (
            "10.100.0.2", "10.100.0.3", "10.100.0.4", "172.16.0.0/24", "172.16.0.0/16", "192.0.2.0/24", "192.0.2.1",
            "fd00:100::2", "fd00:200::/64", "2001:db8::/32",
        ),
    )
)  # fmt: skip
ENDPOINTS = ("", "192.0.2.1:51820", "192.0.2.2:51820", "[2001:db8::7]:51820", "peer.example:51820", "10.100.0.1:1")
RESOLVED = {"peer.example:51820": Endpoint(parse_ip("198.51.100.9"), 51820)}


def settings_for(
    *,
    private_key: PrivateKey = OWN_KEY,
    mesh_ip: bytes = OWN_IP,
    listen_port: int = 51820,
    mtu: int = 0,
    keepalive: int = 25,
    backend: Backend | None = None,
    control_plane: frozenset[bytes] = frozenset(),
) -> Settings:
    return Settings("n_self", "plexd0", private_key, mesh_ip, listen_port, mtu, keepalive, backend, control_plane)


def peer(
    number: int,
    *prefixes: str,
    endpoint: str = "",
    psk: PresharedKey = NO_PRESHARED_KEY,
    key: PublicKey | None = None,
) -> Peer:
    """Peer `n_<number>` with mesh address 10.100.0.<number>, in front of the prefixes given."""
    mesh_ip = bytes([10, 100, 0, number])
    allowed_ips = (Prefix.host(mesh_ip), *map(Prefix.parse, prefixes))
    return Peer(f"n_{number}", key or PublicKey(bytes([number] * 32)), mesh_ip, endpoint, allowed_ips, psk)


def desired_of(*peers: Peer) -> Desired:
    return Desired(
        peers={peer.id: peer for peer in peers},
        candidates={peer.id: Candidates().offer(EndpointSource.PEER, peer.endpoint) for peer in peers},
    )


def target_of(*peers: Peer, settings: Settings | None = None) -> Target:
    return build_target(desired_of(*peers), settings or settings_for(), RESOLVED)


def bring_up(target: Target, kernel: FakeKernel | None = None) -> FakeKernel:
    """A kernel that is as the target wants it."""
    kernel = kernel or FakeKernel()
    converge(target, kernel)
    return kernel


def converge(target: Target, kernel: FakeKernel, moved: frozenset[str] = frozenset()) -> None:
    """One pass, all of which must succeed."""
    outcomes = asyncio.run(kernel.apply(plan(target, kernel.state, NOW, moved)))
    assert [outcome for outcome in outcomes if outcome.error is not None] == []


def assert_is(kernel: FakeKernel, target: Target) -> None:
    """The kernel holds what the target wants and nothing else. Endpoints are the business of whoever asks."""
    state, settings = kernel.state, target.settings
    assert state.link is not None
    assert state.device is not None
    assert state.link.up
    assert state.link.alias == "plexd:mesh"
    assert (state.device.private_key, state.device.listen_port, state.device.fwmark) == (
        settings.private_key,
        settings.listen_port,
        0,
    )
    assert state.addresses == {Prefix.host(settings.mesh_ip)}
    assert state.routes == target.routes
    held = {key: (peer.psk, peer.keepalive, set(peer.allowed_ips)) for key, peer in state.device.peers.items()}
    wanted = {peer.public_key: (peer.psk, settings.keepalive, set(peer.allowed_ips)) for peer in target.peers.values()}
    assert held == wanted


# strategies

all_settings = st.builds(
    settings_for,
    private_key=st.sampled_from((OWN_KEY, OTHER_KEY)),
    mesh_ip=st.sampled_from((OWN_IP, OWN_IPV6)),
    listen_port=st.sampled_from((51820, 51821)),
    mtu=st.sampled_from((0, 1300)),
    keepalive=st.sampled_from((0, 25)),
    control_plane=st.sampled_from((frozenset(), frozenset({parse_ip("172.16.0.5")}))),
)


@st.composite
def desireds(draw: st.DrawFn) -> Desired:
    """Up to five peers with distinct ids and keys; prefixes and endpoints may collide."""
    keys = draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=5))
    ids = draw(st.permutations([f"n_{n}" for n in range(1, 7)]))
    peers = [
        Peer(
            peer_id,
            key,
            OWN_IP,
            draw(st.sampled_from(ENDPOINTS)),
            tuple(draw(st.lists(st.sampled_from(PREFIXES), unique=True, max_size=4))),
            draw(st.sampled_from(PSKS)),
        )
        for peer_id, key in zip(ids, keys, strict=False)
    ]
    return desired_of(*peers)


@st.composite
def targets(draw: st.DrawFn) -> Target:
    return build_target(draw(desireds()), draw(all_settings), RESOLVED)


device_peers = st.builds(
    DevicePeer,
    public_key=st.sampled_from([bytes(key) for key in KEYS]),
    psk=st.sampled_from([bytes(psk) for psk in PSKS]),
    endpoint=st.sampled_from((None, Endpoint(parse_ip("192.0.2.1"), 51820), Endpoint(parse_ip("203.0.113.5"), 4711))),
    keepalive=st.sampled_from((0, 25)),
    last_handshake=st.sampled_from((0.0, NOW - 10, NOW - 180, NOW - 181)),
    rx_bytes=st.just(0),
    tx_bytes=st.just(0),
    allowed_ips=st.lists(st.sampled_from(PREFIXES), unique=True, max_size=4).map(tuple),
)
foreign_routes = st.builds(
    Route, st.sampled_from(PREFIXES), st.sampled_from((None, OWN_IP)), st.sampled_from((ROUTE_METRIC, 50))
)
Damage = Callable[[FakeKernel], None]


damages: st.SearchStrategy[Damage] = st.one_of(
    device_peers.map(lambda peer: lambda kernel: kernel.put_peer(peer)),
    st.sampled_from(KEYS).map(lambda key: lambda kernel: kernel.remove_peer(key)),
    foreign_routes.map(lambda route: lambda kernel: kernel.add_route(route)),
    st.sampled_from(PREFIXES).map(lambda prefix: lambda kernel: kernel.remove_route(Route(prefix, None, ROUTE_METRIC))),
    st.sampled_from(PREFIXES).map(lambda prefix: lambda kernel: kernel.add_address(prefix)),
    st.sampled_from((OWN_IP, OWN_IPV6)).map(lambda ip: lambda kernel: kernel.remove_address(Prefix.host(ip))),
    st.sampled_from((1200, 1300, 9000)).map(lambda mtu: lambda kernel: kernel.set_link(mtu=mtu)),
    st.just(lambda kernel: kernel.set_link(up=False)),
    st.sampled_from((OWN_KEY, OTHER_KEY)).map(lambda key: lambda kernel: kernel.set_device(private_key=key)),
    st.sampled_from((1, 51821)).map(lambda port: lambda kernel: kernel.set_device(listen_port=port)),
    st.just(lambda kernel: kernel.set_device(fwmark=7)),
    st.just(lambda kernel: kernel.stop_answering()),
)


@st.composite
def kernels(draw: st.DrawFn) -> FakeKernel:
    """Nothing there yet, or another target's interface, or its ruins; always one that plexd may touch."""
    kernel = FakeKernel(
        backend=draw(st.sampled_from(list(Backend))), underlay_mtu=draw(st.sampled_from((None, 1200, 1500, 9500)))
    )
    if draw(st.booleans()):
        bring_up(draw(targets()), kernel)
        for damage in draw(st.lists(damages, max_size=6)):
            with contextlib.suppress(ValueError):  # what the kernel does not let people do
                damage(kernel)
    return kernel
