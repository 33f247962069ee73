"""A real agent beside a control plane that breaks in every way: the mesh stays, nobody is removed, all comes back.

It is one agent for all faults, one after the other: what a fault leaves behind is the next one's problem.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.world import MARKS, PATIENCE, Peer, World, run, wait_until

pytestmark = MARKS


@pytest.fixture(autouse=True)
def unharmed(world: World) -> Iterator[None]:
    """Every test begins and ends with the same processes and a whole mesh, and the loops run."""
    world.plane.ask("DELETE", "/faults")
    world.plane.ask("PUT", "/stream", {"retry_milliseconds": 200})
    before = world.pids()
    assert world.mesh_is_whole()
    crashes = len(world.said("service failed"))
    yield
    assert world.is_alive()
    assert world.pids() == before, "the agent or its WireGuard is not the one from before"
    assert world.mesh_is_whole()
    assert len(world.said("service failed")) == crashes


def recovers(world: World) -> None:
    """A new event has its effect, and so has a new state."""
    world.plane.ask("DELETE", "/faults")
    wait_until("the event stream is open", world.streams)
    execution = world.emit_action()
    world.set_peers(*world.peers[1:], Peer(10 + int(world.peers[-1].id.removeprefix("n_")) % 200))
    wait_until("the peers of the new state are in the kernel", world.mesh_is_whole)
    world.wait_for_ack(execution)


def meet(world: World, times: int, endpoint: str, **fault: Any) -> None:
    """The agent meets the fault so often; meanwhile the mesh stays as it is."""
    after, changes = world.plane.last_number(), world.said("peers changed")
    world.plane.inject(endpoint=endpoint, count=None, **fault)
    arrivals = world.plane.wait_for(endpoint, after=after, count=times + 1, timeout=PATIENCE)
    # one may have been under way before; the one behind shows that the others have been digested
    assert [arrival["fault"] for arrival in arrivals[-times:]] == [fault["effect"]] * times
    assert world.mesh_is_whole()
    assert world.said("peers changed") == changes, "somebody was away for a moment"


STATE: dict[str, dict[str, Any]] = {
    "500": {"effect": "status", "status": 500},
    "502 with a page": {"effect": "status", "status": 502, "body": "<html>" * 5000},
    "429 with Retry-After": {"effect": "status", "status": 429, "headers": {"retry-after": "2"}},
    "403": {"effect": "status", "status": 403},
    "404": {"effect": "status", "status": 404},
    "redirect": {"effect": "status", "status": 302, "headers": {"location": "http://192.0.2.9/"}},
    "connection reset": {"effect": "disconnect"},
    "connection cut in mid-body": {"effect": "cut"},
    "body cut in half": {"effect": "truncate"},
    "empty body": {"effect": "end"},
    "{}": {"effect": "body", "body": "{}"},
    "[]": {"effect": "body", "body": "[]"},
    "null": {"effect": "body", "body": "null"},
    "HTML": {"effect": "body", "body": "<html>", "headers": {"content-type": "text/html"}},
    "10 MiB + 1": {"effect": "oversized"},
    "gzip bomb": {"effect": "gzip_bomb", "size": 100 << 20},
}


@pytest.mark.parametrize("fault", STATE.values(), ids=STATE)
def test_broken_state_removes_nobody(world: World, fault: dict[str, Any]) -> None:
    meet(world, 2, "state", **fault)
    recovers(world)


def test_local_damage_is_repaired_while_the_state_is_broken(world: World) -> None:
    meet(world, 1, "state", effect="status", status=500)
    world.lose_a_peer()
    wait_until("the peer is back", world.mesh_is_whole)
    recovers(world)


def test_slow_answer_holds_up_nothing(world: World) -> None:
    after = world.plane.last_number()
    world.plane.inject(endpoint="state", count=1, delay_seconds=8.0)
    world.plane.wait_for("heartbeat", after=after, timeout=PATIENCE)
    world.wait_for_ack(world.emit_action())
    recovers(world)


@pytest.mark.parametrize("name", ["500", "connection reset"])
def test_control_plane_that_fails_everywhere_removes_nobody(world: World, name: str) -> None:
    after = world.plane.last_number()
    world.plane.inject(count=None, **STATE[name])
    world.plane.wait_for("heartbeat", after=after, timeout=PATIENCE)
    assert world.mesh_is_whole()
    recovers(world)


# --- the stream


GARBAGE = {
    "binary": b"\x00\xff\xfe\x80\n\n",
    "fields without sense": b"id\ndata\nevent: x\nretry: soon\nfoo: bar\n: comment\n\n",
    "no envelope": b"id: 99999\ndata: {}\n\n",
    "half an envelope": b'id: 99999\ndata: {"event_type":"peer_removed","event_id":"e"\n\n',
    "not UTF-8": b"id: 99999\ndata: \xff\xff\n\n",
    "an event that never ends": b"data: {",
    "nothing": b"\n\n\n\n",
    "other line ends": b": a\r: b\r\n: c\n\r\n",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_good_events_around_garbage_have_their_effect(world: World, garbage: bytes) -> None:
    before = world.emit_action()
    world.plane.ask("POST", f"/nodes/{world.node_id}/stream", {"raw": garbage.decode("latin-1")})
    # what never ended takes the rest of its own event with it
    world.plane.ask("POST", f"/nodes/{world.node_id}/stream", {"raw": "\n\n"})
    after = world.emit_action()
    for execution in (before, after):
        world.wait_for_ack(execution)


@pytest.mark.parametrize("signer", ["stranger", "nobody"])
def test_forged_event_has_no_effect(world: World, signer: str) -> None:
    for peer in world.peers:
        world.emit("peer_removed", {"peer_id": peer.id}, signer=signer)
    world.wait_for_ack(world.emit_action())
    assert world.mesh_is_whole()


def test_largest_event_has_its_effect(world: World) -> None:
    world.wait_for_ack(world.emit_action(size=4 << 20))


def test_event_that_is_too_large_is_skipped(world: World) -> None:
    too_large = world.emit_action(size=(4 << 20) + 1)
    world.wait_for_ack(world.emit_action())
    assert [a for a in world.plane.arrivals("ack") if a["body"]["execution_id"] == too_large] == []
    assert world.said("event skipped", reason="oversized")


STREAM: dict[str, dict[str, Any]] = {
    "closed at once": {"effect": "end"},
    "reset": {"effect": "disconnect"},
    "cut": {"effect": "cut"},
    "500": {"effect": "status", "status": 500},
    "429 with Retry-After": {"effect": "status", "status": 429, "headers": {"retry-after": "2"}},
    "another media type": {"effect": "body", "body": "{}"},
}


@pytest.mark.parametrize("fault", STREAM.values(), ids=STREAM)
def test_broken_stream_is_opened_again_and_nothing_is_missed(world: World, fault: dict[str, Any]) -> None:
    world.plane.inject(endpoint="events", count=3, **fault)
    world.plane.ask("POST", f"/nodes/{world.node_id}/stream", {"end": True})
    wait_until("the event stream is closed", lambda: not world.streams())
    missed = world.emit_action()
    wait_until("the faults are spent", lambda: not world.plane.ask("GET", "/faults"))
    world.wait_for_ack(missed)
    recovers(world)


def test_other_calls_that_fail_hold_up_nothing(world: World) -> None:
    for endpoint in ("drift", "endpoint", "capabilities", "heartbeat"):
        world.plane.inject(endpoint=endpoint, count=3, effect="status", status=500)
    peer_id = world.lose_a_peer()
    wait_until("the peer is back", world.mesh_is_whole)
    world.plane.wait_for(
        "drift", contains={"corrections": [{"type": "peer_added", "detail": f"peer {peer_id}"}]}, timeout=PATIENCE
    )
    recovers(world)


# --- gone, and refused


def test_control_plane_gone_and_back(world: World) -> None:
    """A quarter of a minute here; two minutes and an hour are in the virtual time of the listener's tests."""
    world.plane.ask("POST", "/listener/stop")
    world.lose_a_peer()
    wait_until("the peer is back without a control plane", world.mesh_is_whole)
    silent = len(list(world.log()))
    subprocess.run(["sleep", "12"], check=True)  # the outage itself, not a wait for something
    attempts = [line for line in list(world.log())[silent:] if line["message"] == "request finished"]
    assert len(attempts) < 60
    assert world.mesh_is_whole()
    world.plane.ask("POST", "/listener/start")
    recovers(world)


def test_one_401_is_a_passing_fault(world: World) -> None:
    after = world.plane.last_number()
    world.plane.inject(endpoint="state", count=1, effect="status", status=401)
    wait_until("a heartbeat confirms the identity", lambda: world.said("identity confirmed after a refusal"))
    assert len(world.plane.arrivals("heartbeat", after)) >= 1
    assert world.said("condition raised", condition="identity_refused") == []
    recovers(world)


@pytest.mark.timeout(300)
def test_refused_identity_takes_nothing_down_and_is_found_again(world: World) -> None:
    world.plane.ask("POST", f"/nodes/{world.node_id}/revoke")
    wait_until("the refusal is confirmed", lambda: world.said("identity refused"))
    world.lose_a_peer()
    wait_until("the peer is back although the identity is refused", world.mesh_is_whole)
    world.plane.ask("POST", f"/nodes/{world.node_id}/restore")
    wait_until("a probe is accepted", lambda: world.said("identity accepted again"), patience=120)
    recovers(world)


# --- what all of that left behind; the last test of the module


def secrets_of(world: World) -> dict[str, str]:
    shown = run(*world.inside, "wg", "show", world.interface, "private-key").strip()
    found = {
        "node key": (world.data / "node_secret_key").read_text().strip(),
        "private key": (world.data / "private_key").read_text().strip(),
        "private key in the kernel": shown,
    }
    held = world.wg()
    found |= {f"psk of {key[:8]}": fields[0] for key, fields in held.items()}
    found |= {f"psk of {peer.id}": peer.psk.reveal() for peer in world.peers}
    return found


def test_no_secret_is_in_any_output_or_argument(world: World) -> None:
    secrets = secrets_of(world)
    assert len(secrets) > 5
    assert all(len(secret) == 44 for secret in secrets.values())
    places = {path.name: path.read_text(errors="replace") for path in (world.output, world.plane.output)}
    for pid in world.pids():
        places[f"arguments of {pid}"] = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        places[f"environment of {pid}"] = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    assert len(places) >= 2 + 2 * 3
    assert any(line["level"] == "debug" for line in world.log())
    leaks = [
        f"{name} in {place}" for name, secret in secrets.items() for place, text in places.items() if secret in text
    ]
    assert leaks == []
