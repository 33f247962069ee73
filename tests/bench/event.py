"""From the bytes of a signed event to the change in the kernel, among few peers and among many; how long the loop stood
still meanwhile; and how many events one core verifies and folds.

The listener, the fold, the converger and what keeps the snapshot on disk are the daemon's own; only the socket is a
queue here. The WireGuard is a real `wireguard-go`, in a namespace: `ip netns exec NAME python -m tests.bench.event
PEERS` prints what `measure` reads.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from nacl.signing import SigningKey
from pydantic import SecretStr

from plexd import log
from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.events.dispatch import Dispatch
from plexd.events.listener import Listener
from plexd.events.state import StateEvents
from plexd.mesh import firewall
from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.desired import Desired, FullState, Peer, Policy, PolicyRule, SigningKeys
from plexd.mesh.events import Foldable
from plexd.mesh.fold import fold, replace_state
from plexd.mesh.keys import NO_PRESHARED_KEY, PrivateKey, PublicKey
from plexd.mesh.observed import Backend
from plexd.mesh.target import Settings
from plexd.node.health import Health
from plexd.node.persist import Persist
from plexd.node.state import Node
from plexd.store.files import DataDirectory
from plexd.store.identity import Identity, IdentityStore
from plexd.store.snapshot import SnapshotStore
from plexd.wire.envelope import Outcome as Verdict
from plexd.wire.envelope import Verifier, seal
from plexd.wire.mapping import OwnNode
from plexd.wire.payloads import parse_event
from plexd.wire.times import format_time
from tests.bench.figure import Figure, percentile
from tests.mesh_kernel import MeshKernel

NAMESPACE = "plexd-bench-event"
INTERFACE = "plexdbench0"
PEERS = (100, 10_000)
EVENTS = 600
ENVELOPES = 10_000
WARM_UP = 8
TICK_SECONDS = 0.001


def measure() -> list[Figure]:
    return [figure for peers in PEERS for figure in (*_latency(peers), *_throughput(peers))]


def _latency(peers: int) -> list[Figure]:
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
    try:
        subprocess.run(["ip", "-n", NAMESPACE, "link", "set", "lo", "up"], check=True)
        command = ["ip", "netns", "exec", NAMESPACE, sys.executable, "-m", "tests.bench.event", str(peers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        subprocess.run(["ip", "netns", "delete", NAMESPACE], check=True)
    taken = Taken(**json.loads(done.stdout.splitlines()[-1]))
    milliseconds = [seconds * 1000 for seconds in taken.latencies]
    return [
        Figure(f"event received to kernel changed, {peers} peers, median", statistics.median(milliseconds), "ms", 5),
        Figure(f"event received to kernel changed, {peers} peers, p99", percentile(milliseconds, 99), "ms", 20),
        Figure(
            f"snapshot encoded and on disk meanwhile, {peers} peers, median",
            statistics.median(taken.saves) * 1000,
            "ms",
        ),
        Figure(f"longest stall of the event loop meanwhile, {peers} peers", taken.longest_stall * 1000, "ms"),
    ]


def _throughput(peers: int) -> list[Figure]:
    key = SigningKey.generate()
    own = OwnNode("n_self", parse_ip("10.255.255.1"), PrivateKey.generate().public())
    wires = [_event(key, number, peers) for number in range(ENVELOPES)]
    desired = _desired(key, peers)
    verifier = Verifier(desired.signing_keys)
    now = time.time()
    started = time.perf_counter()
    for wire in wires:
        verdict = verifier.verify(wire, now=now, monotonic=0.0)
        if verdict.envelope is None or verdict.outcome is not Verdict.VERIFIED:
            raise RuntimeError(f"not verified: {verdict.reason}")
        event = parse_event(verdict.envelope.event_type, verdict.envelope.payload, own=own, now=now)
        folded = fold(desired, cast("Foldable", event))
        if folded is desired:
            raise RuntimeError(f"nothing folded in: {event}")
        desired = folded
    a_second = ENVELOPES / (time.perf_counter() - started)
    budget = 5000 if peers == PEERS[0] else None
    return [Figure(f"events verified and folded, {peers} peers", a_second, "/s", budget, at_least=True)]


def _peer(number: int, **changed: str) -> dict[str, object]:
    mesh_ip = f"10.{100 + number // 62_500}.{number // 250 % 250}.{number % 250 + 2}"
    return {
        "id": f"n_{number}",
        "public_key": base64.b64encode(number.to_bytes(32, "big")[::-1]).decode(),
        "mesh_ip": mesh_ip,
        "endpoint": f"192.0.{number // 250 % 250}.{number % 250 + 1}:51820",
        "allowed_ips": [f"{mesh_ip}/32"],
        "psk": "",
        **changed,
    }


def _event(key: SigningKey, number: int, peers: int) -> str:
    """Each changes something: one peer comes, gets another endpoint, then another key, and goes; then the next one."""
    kind = ("peer_added", "peer_endpoint_changed", "peer_key_rotated", "peer_removed")[number % 4]
    peer = _peer(peers + 1 + number // 4)
    if kind == "peer_endpoint_changed":
        peer["endpoint"] = f"198.51.100.7:{10_000 + number % 50_000}"
    elif kind == "peer_key_rotated":
        peer = {"id": peer["id"], "public_key": base64.b64encode(number.to_bytes(32, "little")[::-1]).decode()}
    return _seal(key, kind, peer, number)


def _desired(key: SigningKey, peers: int) -> Desired:
    wanted = {}
    for number in range(1, peers + 1):
        wire = _peer(number)
        mesh_ip = parse_ip(str(wire["mesh_ip"]))
        wanted[str(wire["id"])] = Peer(
            str(wire["id"]),
            PublicKey.parse(str(wire["public_key"])),
            mesh_ip,
            str(wire["endpoint"]),
            (Prefix.host(mesh_ip),),
            NO_PRESHARED_KEY,
        )
    everybody = Policy("everybody", (PolicyRule("*", "*", 0, "", "allow"),))
    state = FullState(tuple(wanted.values()), (), (everybody,), SigningKeys(bytes(key.verify_key)), {}, {}, {}, {})
    return replace_state(Desired(), state)


def _seal(key: SigningKey, event_type: str, payload: object, number: int) -> str:
    return seal(
        key,
        event_type=event_type,
        event_id=f"ev-{number}",
        issued_at=format_time(time.time()),
        nonce=secrets.token_hex(12),
        payload=json.dumps(payload),
    )


class _TimedSnapshots:
    def __init__(self, snapshots: SnapshotStore) -> None:
        self._snapshots = snapshots
        self.took: list[float] = []

    def save(self, node_id: str, desired: Desired, fetched_at: float) -> None:
        started = time.perf_counter()
        self._snapshots.save(node_id, desired, fetched_at)
        self.took.append(time.perf_counter() - started)

    def save_entries(self, desired: Desired) -> None:
        self._snapshots.save_entries(desired)


class _Stream:
    def __init__(self) -> None:
        self.chunks: asyncio.Queue[bytes] = asyncio.Queue()

    @asynccontextmanager
    async def events(self, _last_event_id: str | None) -> AsyncIterator[AsyncIterator[bytes]]:
        yield self._chunks()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            yield await self.chunks.get()


class _Stalls:
    """How long the loop let a tick wait at most."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def run(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(TICK_SECONDS)
            self.longest = max(self.longest, time.perf_counter() - before - TICK_SECONDS)


@dataclass
class Taken:
    """What one run took, in seconds."""

    latencies: list[float]
    longest_stall: float
    saves: list[float]


async def _run(peers: int, directory: Path) -> Taken:
    key, private_key = SigningKey.generate(), PrivateKey.generate()
    own = OwnNode("n_self", parse_ip("10.255.255.1"), private_key.public())
    health = Health()
    node = Node(Identity("n_self", own.mesh_ip, SecretStr(""), private_key), _desired(key, peers), 0.0, health)
    kernel = MeshKernel(INTERFACE, "userspace", "wireguard-go")
    done: asyncio.Queue[float] = asyncio.Queue()

    def settings(identity: Identity) -> Settings:
        return Settings(
            node_id=identity.node_id,
            interface=INTERFACE,
            private_key=private_key,
            mesh_ip=identity.mesh_ip,
            listen_port=51820,
            mtu=0,
            keepalive=25,
            backend=Backend.USERSPACE,
            policy=firewall.Settings(identity.mesh_ip, (INTERFACE,)),
        )

    mesh = build_mesh(kernel.mesh, kernel.mesh_table, node, settings, health)
    converger = Converger([mesh.resource], health)

    async def apply_event() -> bool:
        applied = await converger.apply_event()
        if not applied:
            raise RuntimeError(f"event not applied: {health.findings()}")
        done.put_nowait(time.perf_counter())
        return applied

    data = DataDirectory(directory)
    snapshots = _TimedSnapshots(SnapshotStore(data))
    persist = Persist(node, snapshots, IdentityStore(data))
    dispatch = Dispatch(lambda: own, _ignore)
    state = StateEvents(node, apply_event, _ignore, persist.save_signing_keys, persist.save_entries)
    dispatch.add(state.component().events)
    stream, stalls = _Stream(), _Stalls()
    listener = Listener(stream, node, Verifier(), dispatch.handle, _ignore, health, 60.0)
    loops: list[asyncio.Task[None]] = []
    try:
        result = await converger.converge()
        if result.failed:
            raise RuntimeError(f"{result.failed} changes failed: {health.findings()}")
        loops = [asyncio.create_task(runner.run()) for runner in (listener, persist, stalls)]

        async def event(number: int) -> float:
            data = f"id: {number}\ndata: {_event(key, number, peers)}\n\n".encode()
            started = time.perf_counter()
            stream.chunks.put_nowait(data)
            return await done.get() - started

        for number in range(WARM_UP):  # what is done once is no part of it
            await event(number)
        await persist.flush()
        snapshots.took.clear()
        stalls.longest = 0.0
        latencies = [await event(WARM_UP + number) for number in range(EVENTS)]
        await persist.flush()
        return Taken(latencies, stalls.longest, snapshots.took)
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        await kernel.tear_down(own.public_key)
        await kernel.close()
        data.close()


def _ignore(_reason: str) -> None:
    pass


def main(peers: int) -> None:
    log.set_up("error", "console")
    with tempfile.TemporaryDirectory(prefix="plexd-bench-") as directory:
        print(json.dumps(asdict(asyncio.run(_run(peers, Path(directory))))))


if __name__ == "__main__":
    main(int(sys.argv[1]))
