"""Of peers without a handshake, or that are not heard after it, a bounded number is tried again a bounded number of
times.
"""

from __future__ import annotations

from dataclasses import replace

from plexd.mesh.changes import PutPeer, RemovePeer
from plexd.mesh.handshakes import (
    AT_ONCE,
    EAGER,
    PATIENT,
    SENT_BY_ITSELF,
    Awaited,
    Traffic,
    assess,
    awaited_anew,
    next_round,
    plan_again,
)
from plexd.mesh.keys import PublicKey
from plexd.mesh.observed import HANDSHAKE_FRESH_SECONDS, Device
from plexd.mesh.target import Target
from tests.mesh.worlds import KEYS, NOW, OTHER_KEY, OWN_KEY, bring_up, peer, settings_for, target_of

ENDPOINT = "192.0.2.1:51820"
TRY = EAGER.tries[0]


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
    assert sorted(tries) == [list(EAGER.looks), list(PATIENT.looks)]
    assert not set(EAGER.looks) & set(PATIENT.looks)
    assert set(EAGER.tries) <= set(EAGER.looks)
    assert set(PATIENT.tries) <= set(PATIENT.looks)


def test_handshake_counts_only_after_the_session_ended_and_was_there_before() -> None:
    target = target_of(peer(2, endpoint=ENDPOINT))
    (key,) = KEYS[1:2]
    device = device_of(target)
    new, renewed = {"n_2": Awaited(0.0, EAGER, TRY)}, {"n_2": Awaited(NOW, EAGER, TRY)}
    table = [(0.0, True, True), (NOW - HANDSHAKE_FRESH_SECONDS - 1, False, False), (NOW - 1, False, True)]
    for at, is_new_one_waited_for, is_renewed_one_waited_for in [*table, (NOW + 1, False, False)]:
        seen = shaken(device, key, at)
        for awaited, is_waited_for in ((new, is_new_one_waited_for), (renewed, is_renewed_one_waited_for)):
            again, left = assess(awaited, target, seen, may_be_deaf=False)
            assert bool(again) is bool(left) is is_waited_for


def test_peer_is_begun_anew_only_in_the_rounds_for_it() -> None:
    target = target_of(peer(2, endpoint=ENDPOINT))
    for pace in (EAGER, PATIENT):
        for rounds in pace.looks:
            due = {"n_2": Awaited(0.0, pace, rounds)}
            again, left = assess(due, target, device_of(target), may_be_deaf=False)
            assert bool(again) is (rounds in pace.tries)
            assert left == due


def test_peer_we_send_to_and_that_is_not_heard_is_begun_anew_where_it_may_be_deaf() -> None:
    target = target_of(peer(2, endpoint=ENDPOINT))
    (key,) = KEYS[1:2]

    def seen(received: int, sent: int) -> Device:
        device = shaken(device_of(target), key, NOW + 1)
        held = device.peers[key]._replace(rx_bytes=received, tx_bytes=sent)
        return replace(device, peers={**device.peers, key: held})

    first = {"n_2": Awaited(NOW, PATIENT, PATIENT.looks[0])}
    assert assess(first, target, seen(92, 500), may_be_deaf=False) == ((), {})
    again, left = assess(first, target, seen(92, 500), may_be_deaf=True)
    assert again == ()
    assert left == {"n_2": first["n_2"]._replace(then=Traffic(92, 500))}
    second = {"n_2": left["n_2"]._replace(rounds=PATIENT.tries[0])}
    assert assess(second, target, seen(124, 900), may_be_deaf=True) == ((), {})
    assert assess(second, target, seen(92, 500 + SENT_BY_ITSELF), may_be_deaf=True) == ((), second)
    again, left = assess(second, target, seen(92, 501 + SENT_BY_ITSELF), may_be_deaf=True)
    assert again == ("n_2",)
    assert left["n_2"].then is None


def test_peer_that_is_gone_or_has_no_endpoint_is_left_alone() -> None:
    target = target_of(peer(2), peer(3, endpoint=ENDPOINT))
    awaited = {f"n_{number}": Awaited(0.0, EAGER, TRY) for number in (2, 3, 4)}
    assert assess(awaited, target, device_of(target), may_be_deaf=False) == (("n_3",), {"n_3": awaited["n_3"]})
    assert assess(awaited, target_of(peer(2)), device_of(target), may_be_deaf=False) == ((), {})


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
