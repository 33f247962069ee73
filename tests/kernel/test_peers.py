"""Peers as WireGuard in the kernel holds them, judged by `wg show dump`."""

from __future__ import annotations

import base64
import time
from dataclasses import replace

import pytest

from plexd.mesh.address import Endpoint, Prefix, parse_ip
from plexd.mesh.changes import RenewSessions
from plexd.mesh.handshakes import EAGER, Awaited, assess, plan_again
from plexd.mesh.keys import NO_PRESHARED_KEY, PrivateKey
from plexd.mesh.plan import plan_event
from plexd.mesh.target import Target, TargetPeer
from tests.kernel.mesh import PRIVATE_KEY, Agent, assert_in_kernel, mesh_of, numbered_peer, run, wg_dump, with_peers
from tests.tunnel.post import DATA, INITIATION, INITIATIONS_APART_SECONDS, RESPONSE, Post

pytestmark = pytest.mark.usefixtures("namespace")

OTHER_KEY = PrivateKey(bytes([16, *range(30), 64]))


def one_changed(target: Target, peer: TargetPeer) -> Target:
    return with_peers(target, [*(other for other in target.peers.values() if other.id != peer.id), peer])


def test_a_thousand_peers_stand_in_the_kernel_as_wanted() -> None:
    agent = Agent(mesh_of([numbered_peer(number) for number in range(1000)]))
    assert agent.corrections() == ["interface_repaired plexd0: link, 1000 peers, 1400 routes"]
    assert_in_kernel(agent.target)
    assert agent.converge() == []


def test_allowed_ips_beyond_64_kib_of_one_peer_all_arrive() -> None:
    many = tuple(
        Prefix.parse(text)
        for number in range(2000)
        for text in (f"10.{number // 256}.{number % 256}.0/24", f"fd00::{number:x}:0:0/96")
    )
    agent = Agent(mesh_of([numbered_peer(1), numbered_peer(2)._replace(allowed_ips=many), numbered_peer(3)]))
    agent.corrections()
    assert_in_kernel(agent.target)
    assert agent.converge() == []


def test_preshared_key_is_cleared_when_there_is_none_any_more() -> None:
    agent = Agent(mesh_of([numbered_peer(1), numbered_peer(2)]))
    agent.corrections()
    agent.target = one_changed(agent.target, numbered_peer(1)._replace(psk=NO_PRESHARED_KEY))
    assert agent.corrections() == ["peer_updated peer n_1: psk"]
    assert_in_kernel(agent.target)


def test_endpoint_event_leaves_the_rest_of_the_peer_alone() -> None:
    """The device differs from the target in what the event does not speak of, and still does so afterwards."""
    agent = Agent(mesh_of([numbered_peer(number) for number in (1, 2, 3)]))
    agent.corrections()
    key = str(numbered_peer(1).public_key)
    run("wg", "set", "plexd0", "peer", key, "allowed-ips", "10.77.0.0/16", "preshared-key", "/dev/null")
    before, writes = wg_dump(), agent.kernel.netlink_writes
    after = one_changed(agent.target, numbered_peer(1)._replace(endpoint=Endpoint(parse_ip("198.51.100.9"), 4000)))
    outcomes = agent.apply(plan_event(agent.target, after))
    assert [outcome.error for outcome in outcomes] == [None]
    assert agent.kernel.netlink_writes == writes + 1
    assert wg_dump() == before | {key: ("(none)", "198.51.100.9:4000", "10.77.0.0/16", "25")}


def test_peer_events_bring_and_take_exactly_their_peer() -> None:
    agent = Agent(mesh_of([numbered_peer(number) for number in range(10)]))
    agent.corrections()
    for peers in ([*range(11)], [*range(1, 11)], [*range(1, 11)]):
        after = with_peers(agent.target, [numbered_peer(number) for number in peers])
        agent.apply(plan_event(agent.target, after))
        agent.target = after
        assert_in_kernel(after)


def test_prefix_that_moves_between_peers_arrives_at_the_new_one() -> None:
    agent = Agent(mesh_of([numbered_peer(0), numbered_peer(1)]))
    agent.corrections()
    swapped = [
        numbered_peer(0)._replace(allowed_ips=numbered_peer(1).allowed_ips),
        numbered_peer(1)._replace(allowed_ips=numbered_peer(0).allowed_ips),
    ]
    agent.target = with_peers(agent.target, swapped)
    agent.corrections()
    assert_in_kernel(agent.target)
    assert agent.converge() == []


def test_new_key_of_a_peer_replaces_the_old_one() -> None:
    agent = Agent(mesh_of([numbered_peer(number) for number in range(3)]))
    agent.corrections()
    agent.target = one_changed(agent.target, numbered_peer(2)._replace(public_key=numbered_peer(99).public_key))
    agent.corrections()
    assert_in_kernel(agent.target)


def test_peer_that_the_kernel_refuses_does_not_keep_the_others_out() -> None:
    agent = Agent(mesh_of([numbered_peer(number) for number in range(20)]))
    bad = numbered_peer(7)._replace(allowed_ips=(Prefix(parse_ip("10.100.0.7"), 77),))
    agent.target = replace(agent.target, peers={**agent.target.peers, "n_7": bad})
    failed = [outcome for outcome in agent.converge() if outcome.error]
    assert [outcome.error for outcome in failed] == ["could not write peer n_7: Invalid argument"]
    held = wg_dump()
    assert [peer.id for peer in agent.target.peers.values() if str(peer.public_key) not in held] in ([], ["n_7"])


def test_own_new_key_has_the_peers_shake_hands_before_there_is_anything_to_send() -> None:
    """By themselves they would not: the keepalive goes on at its interval, and there is no traffic."""
    with Post(51820) as post:
        peer = numbered_peer(1)._replace(endpoint=Endpoint(parse_ip("127.0.0.1"), post.ports[0]))
        agent = Agent(mesh_of([peer]))
        agent.corrections()
        assert post.take(0)[0] == INITIATION
        outcomes = agent.apply(plan_event(agent.target, mesh_of([peer], private_key=OTHER_KEY)))
        assert [outcome.error for outcome in outcomes] == [None, None]
        assert post.take(0)[0] == INITIATION


def test_handshakes_that_cross_cost_both_until_one_device_takes_its_peer_out_and_puts_it_back() -> None:
    with Post(51820, 51821) as post:
        key = OTHER_KEY.public()
        peer = numbered_peer(1)._replace(public_key=key, endpoint=Endpoint(parse_ip("127.0.0.1"), post.ports[0]))
        agent = Agent(mesh_of([peer]))
        start_other_device(peer, post.ports[1])
        agent.corrections()
        assert post.swap() == [INITIATION, INITIATION]
        assert post.swap() == [RESPONSE, RESPONSE]
        time.sleep(2 * INITIATIONS_APART_SECONDS)
        agent.apply([RenewSessions((key,), 25)])  # nor does that, within five seconds
        device = agent.observe().device
        assert device is not None
        awaited = {peer.id: Awaited(0.0, EAGER, EAGER.tries[0])}
        again, _ = assess(awaited, agent.target, device, may_be_deaf=False)
        outcomes = agent.apply(plan_again(again, agent.target, device))
        assert [outcome.error for outcome in outcomes] == [None, None]
        assert [post.carry(0), post.carry(1), post.carry(0)] == [INITIATION, RESPONSE, DATA]
        assert_in_kernel(agent.target)
        device = agent.observe().device
        assert device is not None
        assert assess(awaited, agent.target, device, may_be_deaf=False) == ((), {})


def start_other_device(peer: TargetPeer, own_peer_port: int) -> None:
    """The peer, in the same network, with nothing but keys and a session to begin."""
    run("ip", "link", "add", "other0", "type", "wireguard")
    private_key, preshared_key = OTHER_KEY.reveal(), base64.b64encode(peer.psk).decode()
    run("wg", "setconf", "other0", "/dev/stdin", stdin=(
        f"[Interface]\nPrivateKey = {private_key}\nListenPort = 51821\n"
        f"[Peer]\nPublicKey = {PRIVATE_KEY.public()}\nPresharedKey = {preshared_key}\n"
        f"Endpoint = 127.0.0.1:{own_peer_port}\nPersistentKeepalive = 25\n"
    ))  # fmt: skip
    run("ip", "link", "set", "other0", "up")
