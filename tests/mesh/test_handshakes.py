"""Of peers without a handshake a bounded number is tried again a bounded number of times."""

from __future__ import annotations

from dataclasses import replace

from plexd.mesh.changes import PutPeer, RemovePeer
from plexd.mesh.handshakes import AT_ONCE, EAGER, PATIENT, Awaited, awaited_anew, next_round, plan_again, unanswered
from plexd.mesh.keys import PublicKey
from plexd.mesh.observed import HANDSHAKE_FRESH_SECONDS, Device
from plexd.mesh.target import Target
from tests.mesh.worlds import KEYS, NOW, OTHER_KEY, OWN_KEY, bring_up, peer, settings_for, target_of

ENDPOINT = "192.0.2.1:51820"


def device_of(target: Target) -> Device:
    device = bring_up(target).state.device
    assert device is not None
    return device


def shaken(device: Device, key: PublicKey, at: float) -> Device:
    return replace(device, peers={**device.peers, key: device.peers[key]._replace(last_handshake=at)})


def rounds_of(awaited: Awaited) -> list[int]:
    left, tried = {"n_2": awaited}, []
    for number in range(1, 100):
        left, due = next_round(left)
        tried += [number for _ in due]
    assert left == {}
    return tried


def test_of_two_nodes_one_is_eager_and_the_other_one_patient_and_never_in_the_same_round() -> None:
    tries = []
    for own, other in ((OWN_KEY, OTHER_KEY), (OTHER_KEY, OWN_KEY)):
        target = target_of(peer(2, key=other.public()), settings=settings_for(private_key=own))
        (awaited,) = awaited_anew([other.public()], target, NOW).values()
        tries.append(rounds_of(awaited))
    assert sorted(tries) == [list(EAGER), list(PATIENT)]
    assert not set(EAGER) & set(PATIENT)


def test_handshake_counts_only_after_the_session_ended_and_was_there_before() -> None:
    target = target_of(peer(2, endpoint=ENDPOINT))
    (key,) = KEYS[1:2]
    device = device_of(target)
    new, renewed = {"n_2": Awaited(0.0, EAGER)}, {"n_2": Awaited(NOW, EAGER)}
    table = [(0.0, True, True), (NOW - HANDSHAKE_FRESH_SECONDS - 1, False, False), (NOW - 1, False, True)]
    for at, is_new_one_waited_for, is_renewed_one_waited_for in [*table, (NOW + 1, False, False)]:
        seen = shaken(device, key, at)
        assert bool(unanswered(new, target, seen)) is is_new_one_waited_for
        assert bool(unanswered(renewed, target, seen)) is is_renewed_one_waited_for


def test_peer_that_is_gone_or_has_no_endpoint_is_left_alone() -> None:
    target = target_of(peer(2), peer(3, endpoint=ENDPOINT))
    awaited = {f"n_{number}": Awaited(0.0, EAGER) for number in (2, 3, 4)}
    assert unanswered(awaited, target, device_of(target)) == ("n_3",)
    assert unanswered(awaited, target_of(peer(2)), device_of(target)) == ()


def test_of_very_many_peers_those_that_were_heard_are_tried() -> None:
    numbers = range(2, 2 + 2 * AT_ONCE)
    keys = {number: PublicKey(number.to_bytes(32, "big")) for number in numbers}
    target = target_of(*(peer(2, endpoint=ENDPOINT, key=keys[n])._replace(id=f"n_{n}") for n in numbers))
    device = device_of(target)
    heard = numbers[-1]
    device = replace(device, peers={**device.peers, keys[heard]: device.peers[keys[heard]]._replace(rx_bytes=148)})
    changes = plan_again(target.peers, target, device)
    assert len(changes) == 2 * AT_ONCE
    assert [change.peer_id for change in changes[:2]] == [f"n_{heard}"] * 2
    for removed, put in zip(changes[::2], changes[1::2], strict=True):
        assert isinstance(removed, RemovePeer)
        assert isinstance(put, PutPeer)
        assert put.is_new
        assert removed.public_key == put.public_key
