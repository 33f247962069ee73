"""The text of WireGuard programs, as the cross-platform interface describes it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.linux.wireguard import uapi
from plexd.mesh.address import Endpoint, Prefix, parse_ip
from plexd.mesh.changes import PeerChange, PutPeer, RemovePeer
from plexd.mesh.keys import NO_PRESHARED_KEY, PresharedKey, PrivateKey, PublicKey
from plexd.mesh.observed import Device, DevicePeer
from tests.linux.devices import answer_with

KEY = PublicKey(bytes(range(32)))
PSK = PresharedKey(bytes(range(32, 64)))
V4 = Endpoint(parse_ip("192.0.2.7"), 51820)
V6 = Endpoint(parse_ip("2001:db8::7"), 4000)
HOST, NETWORK = Prefix.parse("10.99.0.7"), Prefix.parse("fd00:99::/64")


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (RemovePeer("n_7", KEY), [f"public_key={KEY.hex()}", "remove=true"]),
        (
            PutPeer("n_7", KEY, True, PSK, V4, 25, (HOST, NETWORK), ("added",)),
            [
                f"public_key={KEY.hex()}",
                f"preshared_key={PSK.hex()}",
                "endpoint=192.0.2.7:51820",
                "persistent_keepalive_interval=25",
                "replace_allowed_ips=true",
                "allowed_ip=10.99.0.7/32",
                "allowed_ip=fd00:99::/64",
            ],
        ),
        (
            PutPeer("n_7", KEY, False, None, V6, None, None, ("endpoint",)),
            [f"public_key={KEY.hex()}", "update_only=true", "endpoint=[2001:db8::7]:4000"],
        ),
        (
            PutPeer("n_7", KEY, False, NO_PRESHARED_KEY, None, 0, (), ("psk",)),
            [
                f"public_key={KEY.hex()}",
                "update_only=true",
                f"preshared_key={'00' * 32}",
                "persistent_keepalive_interval=0",
                "replace_allowed_ips=true",
            ],
        ),
    ],
)
def test_change_is_written_line_by_line(change: PeerChange, lines: list[str]) -> None:
    (request,) = uapi.change_peers([change])
    assert request.decode() == "\n".join(["set=1", *lines]) + "\n\n"


def test_device_is_written_with_key_port_and_no_mark() -> None:
    key = PrivateKey(bytes(range(32)))
    assert uapi.set_device(key, 51820).decode() == (f"set=1\nprivate_key={key.hex()}\nlisten_port=51820\nfwmark=0\n\n")


def test_many_peers_are_spread_over_operations() -> None:
    changes = [RemovePeer(None, PublicKey(number.to_bytes(32, "big"))) for number in range(600)]
    requests = list(uapi.change_peers(changes))
    assert len(requests) == 3
    assert all(request.startswith(b"set=1\n") and request.endswith(b"true\n\n") for request in requests)
    assert b"".join(requests).count(b"remove=true") == 600


def test_restarted_keepalive_is_off_and_on_again() -> None:
    (request,) = uapi.restart_keepalives([KEY], 25)
    interval = "persistent_keepalive_interval"
    assert request.decode() == f"set=1\npublic_key={KEY.hex()}\nupdate_only=true\n{interval}=0\n{interval}=25\n\n"


keys = st.binary(min_size=32, max_size=32)
packed_ips = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))
device_peers = st.builds(
    DevicePeer,
    keys,
    keys,
    st.none() | st.builds(Endpoint, packed_ips, st.integers(1, 65535)),
    st.integers(0, 65535),
    st.integers(0, 2**31).map(float) | st.just(1_700_000_000.5),
    st.integers(0, 2**63),
    st.integers(0, 2**63),
    st.lists(
        packed_ips.flatmap(lambda packed: st.builds(Prefix.of, st.just(packed), st.integers(0, len(packed) * 8))),
        max_size=4,
    ).map(tuple),
)


@given(
    st.builds(
        Device,
        st.none() | st.builds(PrivateKey, keys.filter(any)),
        st.integers(0, 65535),
        st.integers(0, 2**32 - 1),
        st.lists(device_peers, max_size=5, unique_by=lambda peer: peer.public_key).map(
            lambda peers: {peer.public_key: peer for peer in peers}
        ),
    )
)
def test_device_is_read_back(device: Device) -> None:
    answer = answer_with(device)
    assert uapi.read_device(answer) == device
    assert uapi.errno_of(answer) == 0


def test_private_key_of_zeros_is_none() -> None:
    assert uapi.read_device(f"private_key={'00' * 32}\nerrno=0\n\n").private_key is None


def test_zone_of_a_link_local_endpoint_is_dropped() -> None:
    answer = f"public_key={KEY.hex()}\nendpoint=[fe80::1%eth0]:51820\nerrno=0\n\n"
    assert uapi.read_device(answer).peers[KEY].endpoint == Endpoint(parse_ip("fe80::1"), 51820)


@pytest.mark.parametrize(
    "line", ["listen_port=many", "private_key=xyz", f"public_key={KEY.hex()}\nallowed_ip=10.0.0.256/32"]
)
def test_impossible_value_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        uapi.read_device(f"{line}\nerrno=0\n\n")


@pytest.mark.parametrize(("answer", "code"), [("errno=0\n\n", 0), ("errno=-98\n\n", 98), ("errno=22\n\n", 22)])
def test_errno_counts_whatever_its_sign(answer: str, code: int) -> None:
    assert uapi.errno_of(answer) == code


@pytest.mark.parametrize("answer", ["", "\n\n", "listen_port=1\n\n", "errno=\n\n"])
def test_answer_without_an_errno_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        uapi.errno_of(answer)
