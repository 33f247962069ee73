"""Packed generic netlink, against an attribute at a time."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plexd.linux.netlink import attribute, attributes
from plexd.linux.wireguard import messages
from plexd.mesh.address import Endpoint, Prefix, parse_ip
from plexd.mesh.changes import PeerChange, PutPeer, RemovePeer
from plexd.mesh.keys import NO_PRESHARED_KEY, PresharedKey, PrivateKey, PublicKey
from plexd.mesh.observed import Device, DevicePeer
from tests.linux.devices import dump_allowed_ip, dump_message, dump_peer, nested

KEY = PublicKey(bytes(range(32)))
PSK = PresharedKey(bytes(range(32, 64)))
V4 = Endpoint(parse_ip("192.0.2.7"), 51820)
V6 = Endpoint(parse_ip("2001:db8::7"), 4000)
HOST = Prefix.parse("10.99.0.7")
NETWORK = Prefix.parse("fd00:99::/64")

packed_ips = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))
prefixes = packed_ips.flatmap(lambda packed: st.builds(Prefix.of, st.just(packed), st.integers(0, len(packed) * 8)))
endpoints = st.builds(Endpoint, packed_ips, st.integers(1, 65535))
keys = st.binary(min_size=32, max_size=32)


def put(
    *,
    is_new: bool = True,
    psk: PresharedKey | None = PSK,
    endpoint: Endpoint | None = V4,
    keepalive: int | None = 25,
    allowed_ips: tuple[Prefix, ...] | None = (HOST,),
) -> PutPeer:
    return PutPeer("n_7", KEY, is_new, psk, endpoint, keepalive, allowed_ips, ("added",))


# what a message says, read an attribute at a time


def read_peers(message: bytes) -> list[dict[int, bytes]]:
    """The attributes of each peer by type; the command and the interface are looked at here."""
    assert message[:2] == bytes((messages.SET_DEVICE, messages.GENL_VERSION))
    given = {kind: message[start:end] for kind, start, end in attributes(message, 4, len(message))}
    assert given.keys() == {messages.DEVICE_IFNAME, messages.DEVICE_PEERS}
    assert given[messages.DEVICE_IFNAME] == b"plexd0\0"
    peers = given[messages.DEVICE_PEERS]
    return [
        {kind: peers[begin:stop] for kind, begin, stop in attributes(peers, start, end)}
        for _, start, end in attributes(peers, 0, len(peers))
    ]


def one_message(changes: Sequence[PeerChange]) -> bytes:
    (message,) = messages.change_peers("plexd0", changes)
    return message


def read_allowed_ips(value: bytes) -> list[Prefix]:
    found = []
    for _, start, end in attributes(value, 0, len(value)):
        parts = {kind: value[begin:stop] for kind, begin, stop in attributes(value, start, end)}
        packed = parts[messages.ALLOWED_IP_ADDRESS]
        family = {4: socket.AF_INET, 16: socket.AF_INET6}[len(packed)]
        assert parts[messages.ALLOWED_IP_FAMILY] == struct.pack("=H", family)
        found.append(Prefix(packed, parts[messages.ALLOWED_IP_LENGTH][0]))
    return found


def read_change(peer: dict[int, bytes]) -> PeerChange:
    (flags,) = struct.unpack("=I", peer[messages.PEER_FLAGS])
    key = PublicKey(peer[messages.PEER_PUBLIC_KEY])
    if flags & messages.REMOVE_ME:
        assert peer.keys() == {messages.PEER_FLAGS, messages.PEER_PUBLIC_KEY}
        return RemovePeer(None, key)
    endpoint = None
    if (sockaddr := peer.get(messages.PEER_ENDPOINT)) is not None:
        family, port = struct.unpack_from("=H", sockaddr)[0], struct.unpack_from("!H", sockaddr, 2)[0]
        packed = sockaddr[4:8] if family == socket.AF_INET else sockaddr[8:24]
        assert len(sockaddr) == (16 if family == socket.AF_INET else 28)
        endpoint = Endpoint(packed, port)
    psk = peer.get(messages.PEER_PSK)
    keepalive = peer.get(messages.PEER_KEEPALIVE)
    allowed_ips = tuple(read_allowed_ips(peer.get(messages.PEER_ALLOWED_IPS, b"")))
    return put(
        is_new=not flags & messages.UPDATE_ONLY,
        psk=None if psk is None else PresharedKey(psk),
        endpoint=endpoint,
        keepalive=None if keepalive is None else struct.unpack("=H", keepalive)[0],
        allowed_ips=allowed_ips if flags & messages.REPLACE_ALLOWED_IPS else None,
    )


@given(
    st.builds(
        put,
        is_new=st.booleans(),
        psk=st.none() | st.builds(PresharedKey, keys),
        endpoint=st.none() | endpoints,
        keepalive=st.none() | st.integers(0, 65535),
        allowed_ips=st.none() | st.lists(prefixes, max_size=5).map(tuple),
    )
)
def test_whatever_is_put_is_what_the_message_says(change: PutPeer) -> None:
    (peer,) = read_peers(one_message([change]))
    assert read_change(peer) == change


@pytest.mark.parametrize("endpoint", [V4, V6])
def test_usual_peer_is_the_same_bytes_whichever_way_it_is_made(endpoint: Endpoint) -> None:
    """The whole-struct way covers the IPv4 one only, and must not differ from the other."""
    change = put(endpoint=endpoint)
    assert list(messages._peer(change)) == list(messages._any_peer(change))


def test_removal_names_the_key_only() -> None:
    (peer,) = read_peers(one_message([RemovePeer("n_7", KEY)]))
    assert read_change(peer) == RemovePeer(None, KEY)


def test_psk_is_cleared_by_zeros_and_kept_by_leaving_it_out() -> None:
    cleared, kept = read_peers(one_message([put(psk=NO_PRESHARED_KEY), put(psk=None)]))
    assert cleared[messages.PEER_PSK] == bytes(32)
    assert messages.PEER_PSK not in kept


def test_endpoint_alone_is_an_update_of_nothing_else() -> None:
    change = put(is_new=False, psk=None, keepalive=None, allowed_ips=None)
    (peer,) = read_peers(one_message([change]))
    assert peer.keys() == {messages.PEER_PUBLIC_KEY, messages.PEER_FLAGS, messages.PEER_ENDPOINT}
    assert peer[messages.PEER_FLAGS] == struct.pack("=I", messages.UPDATE_ONLY)


def test_many_peers_are_spread_over_messages_in_order() -> None:
    changes = [put()._replace(public_key=PublicKey(number.to_bytes(32, "big"))) for number in range(1000)]
    sent = list(messages.change_peers("plexd0", changes))
    assert 5 <= len(sent) <= 7
    assert all(len(message) < 31 * 1024 for message in sent)
    seen = [peer[messages.PEER_PUBLIC_KEY] for message in sent for peer in read_peers(message)]
    assert seen == [change.public_key for change in changes]


def test_peers_added_silently_get_nothing_but_their_keepalive_later() -> None:
    new = [put()._replace(public_key=PublicKey(number.to_bytes(32, "big"))) for number in range(1000)]
    changes: list[PeerChange] = [
        RemovePeer(None, KEY), put(is_new=False, keepalive=7), put(keepalive=0), put(keepalive=None), *new
    ]  # fmt: skip
    written = [peer for sent in messages.change_peers("plexd0", changes, silently=True) for peer in read_peers(sent)]
    others = [RemovePeer(None, KEY), put(is_new=False, keepalive=7), put(keepalive=0), put(keepalive=0)]
    assert [read_change(peer) for peer in written] == [*others, *[put(keepalive=0)] * len(new)]
    begun = [peer for sent in messages.set_keepalives("plexd0", changes) for peer in read_peers(sent)]
    assert [read_change(peer) for peer in begun] == [
        put(is_new=False, psk=None, endpoint=None, allowed_ips=None)
    ] * len(new)
    for peers in (written[len(others) :], begun):
        assert [peer[messages.PEER_PUBLIC_KEY] for peer in peers] == [change.public_key for change in new]


def test_restarted_keepalive_is_off_and_on_again() -> None:
    (sent,) = messages.restart_keepalives("plexd0", [KEY], 25)
    off, on = (read_change(peer) for peer in read_peers(sent))
    unchanged = put(is_new=False, psk=None, endpoint=None, allowed_ips=None)
    assert (off, on) == (unchanged._replace(keepalive=0), unchanged)


def test_peer_with_more_allowed_ips_than_fit_is_continued_without_replacing() -> None:
    many = tuple(Prefix.host(number.to_bytes(16, "big")) for number in range(2000))
    sent = list(messages.change_peers("plexd0", [put(allowed_ips=many), RemovePeer(None, KEY)]))
    assert all(len(message) < 31 * 1024 for message in sent)
    first, *rest, removal = [peer for message in sent for peer in read_peers(message)]
    assert first[messages.PEER_FLAGS] == struct.pack("=I", messages.REPLACE_ALLOWED_IPS)
    assert rest
    for peer in rest:
        assert peer.keys() == {messages.PEER_PUBLIC_KEY, messages.PEER_FLAGS, messages.PEER_ALLOWED_IPS}
        assert peer[messages.PEER_FLAGS] == struct.pack("=I", messages.UPDATE_ONLY)
    found = [ip for peer in (first, *rest) for ip in read_allowed_ips(peer[messages.PEER_ALLOWED_IPS])]
    assert tuple(found) == many
    assert read_change(removal) == RemovePeer(None, KEY)


def test_device_gets_key_port_and_no_mark() -> None:
    private_key = PrivateKey.generate()
    message = messages.set_device("plexd0", private_key, 51820)
    assert {kind: message[start:end] for kind, start, end in attributes(message, 4, len(message))} == {
        messages.DEVICE_IFNAME: b"plexd0\0",
        messages.DEVICE_PRIVATE_KEY: private_key,
        messages.DEVICE_LISTEN_PORT: struct.pack("=H", 51820),
        messages.DEVICE_FWMARK: bytes(4),
    }


# dumps


device_peers = st.builds(
    DevicePeer,
    keys,
    keys,
    st.none() | endpoints,
    st.integers(0, 65535),
    st.integers(0, 2**31).map(float) | st.just(1_700_000_000.5),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.lists(prefixes, max_size=4).map(tuple),
)
usual_peers = device_peers.map(lambda peer: peer._replace(endpoint=V4, allowed_ips=(HOST,)))


@given(
    st.lists(device_peers | usual_peers, max_size=8, unique_by=lambda peer: peer.public_key),
    st.none() | st.randoms(use_true_random=False),
)
@settings(max_examples=300)
def test_dump_is_read_back_in_the_kernels_order_and_in_any_other(
    peers: list[DevicePeer], shuffle: random.Random | None
) -> None:
    device = messages.read_dump([dump_message(dump_peer(peer, shuffle) for peer in peers)])
    assert device == Device(None, 0, 0, {peer.public_key: peer for peer in peers})
    assert list(device.peers) == [peer.public_key for peer in peers]


def test_device_of_a_dump_has_key_port_and_mark() -> None:
    private_key = PrivateKey.generate()
    payload = dump_message(
        [],
        attribute(messages.DEVICE_LISTEN_PORT, struct.pack("=H", 51820)),
        attribute(messages.DEVICE_FWMARK, struct.pack("=I", 7)),
        attribute(messages.DEVICE_PRIVATE_KEY, private_key),
        attribute(messages.DEVICE_PUBLIC_KEY, private_key.public()),
    )
    assert messages.read_dump([payload]) == Device(private_key, 51820, 7, {})


def test_private_key_of_zeros_is_none() -> None:
    assert messages.read_dump([dump_message([], attribute(messages.DEVICE_PRIVATE_KEY, bytes(32)))]) == Device(
        None, 0, 0, {}
    )


def test_empty_dump_is_no_device() -> None:
    assert messages.read_dump([]) is None


def test_peer_continued_in_the_next_message_is_one_peer() -> None:
    many = tuple(Prefix.host(number.to_bytes(4, "big")) for number in range(100))
    whole = DevicePeer(KEY, PSK, V4, 25, 1.0, 2, 3, many)
    other = whole._replace(public_key=bytes(32))
    rest = nested(
        0,
        [
            attribute(messages.PEER_PUBLIC_KEY, KEY),
            nested(messages.PEER_ALLOWED_IPS, [dump_allowed_ip(ip, None) for ip in many[60:]]),
        ],
    )
    device = messages.read_dump(
        [dump_message([dump_peer(whole._replace(allowed_ips=many[:60]))]), dump_message([rest, dump_peer(other)])]
    )
    assert device is not None
    assert device.peers == {KEY: whole, bytes(32): other}


@given(st.binary(max_size=400), st.integers(0, 300))
def test_garbage_is_refused_or_read_but_never_breaks(garbage: bytes, cut: int) -> None:
    whole = dump_message([dump_peer(DevicePeer(KEY, PSK, V6, 25, 1.0, 2, 3, (HOST, NETWORK)))])
    for payload in (garbage, whole[:cut] + garbage):
        with contextlib.suppress(ValueError, struct.error):
            messages.read_dump([payload])
