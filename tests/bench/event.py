"""From the bytes of a signed event to the change in the kernel, and how many envelopes one core verifies.

The listener, the fold and the converger are the daemon's own; only the socket is a queue here. The WireGuard is a
real `wireguard-go`, in a namespace: `ip netns exec NAME python -m tests.bench.event` prints what `measure` reads.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

from nacl.signing import SigningKey
from pydantic import SecretStr

from plexd import log
from plexd.converge import Converger
from plexd.health import Health
from plexd.linux.kernel import Kernel
from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.changes import Change, Outcome
from plexd.mesh.desired import Desired, Peer, SigningKeys
from plexd.mesh.keys import NO_PRESHARED_KEY, PrivateKey, PublicKey
from plexd.mesh.observed import Backend, Observed
from plexd.mesh.target import Settings
from plexd.node import Node
from plexd.services.effects import Effects
from plexd.services.listener import Listener
from plexd.store.identity import Identity
from plexd.wire.envelope import Outcome as Verdict
from plexd.wire.envelope import Verifier, seal
from plexd.wire.mapping import OwnNode
from plexd.wire.times import format_time
from tests.bench.figure import Figure, percentile

NAMESPACE = "plexd-bench-event"
INTERFACE = "plexdbench0"
PEERS = 100
EVENTS = 600
ENVELOPES = 20_000


def measure() -> list[Figure]:
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
    try:
        subprocess.run(["ip", "-n", NAMESPACE, "link", "set", "lo", "up"], check=True)
        command = ["ip", "netns", "exec", NAMESPACE, sys.executable, "-m", "tests.bench.event"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        subprocess.run(["ip", "netns", "delete", NAMESPACE], check=True)
    milliseconds = [float(line) * 1000 for line in done.stdout.split()]
    return [
        Figure(f"event received to kernel changed, {PEERS} peers, median", statistics.median(milliseconds), "ms", 5),
        Figure(f"event received to kernel changed, {PEERS} peers, p99", percentile(milliseconds, 99), "ms", 20),
        Figure("envelopes parsed and verified", _envelopes_a_second(), "/s", 5000, at_least=True),
    ]


def _envelopes_a_second() -> float:
    key = SigningKey.generate()
    wires = [_seal(key, "peer_added", _peer(n % 250), n) for n in range(ENVELOPES)]
    verifier = Verifier(SigningKeys(bytes(key.verify_key)))
    now = time.time()
    started = time.perf_counter()
    good = sum(verifier.verify(wire, now=now, monotonic=0.0).outcome is Verdict.VERIFIED for wire in wires)
    elapsed = time.perf_counter() - started
    if good != ENVELOPES:
        raise RuntimeError(f"only {good} of {ENVELOPES} verified")
    return ENVELOPES / elapsed


def _peer(number: int) -> dict[str, object]:
    mesh_ip = f"10.100.{number // 250}.{number % 250 + 2}"
    return {
        "id": f"n_{number}",
        "public_key": base64.b64encode(number.to_bytes(32, "big")[::-1]).decode(),
        "mesh_ip": mesh_ip,
        "endpoint": f"192.0.2.{number % 250 + 1}:51820",
        "allowed_ips": [f"{mesh_ip}/32"],
        "psk": "",
    }


def _seal(key: SigningKey, event_type: str, payload: object, number: int) -> str:
    return seal(
        key,
        event_type=event_type,
        event_id=f"ev-{number}",
        issued_at=format_time(time.time()),
        nonce=secrets.token_hex(12),
        payload=json.dumps(payload),
    )


class _TimedKernel:
    """The door, noting when each change was through it."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.done: asyncio.Queue[float] = asyncio.Queue()

    async def observe(self, endpoints: Collection[bytes] | None = None, *, device: bool = True) -> Observed:
        return await self._kernel.observe(endpoints, device=device)

    async def apply(self, changes: Sequence[Change]) -> list[Outcome]:
        outcomes = await self._kernel.apply(changes)
        self.done.put_nowait(time.perf_counter())
        return outcomes


class _Stream:
    def __init__(self) -> None:
        self.chunks: asyncio.Queue[bytes] = asyncio.Queue()

    @asynccontextmanager
    async def events(self, _last_event_id: str | None) -> AsyncIterator[AsyncIterator[bytes]]:
        yield self._chunks()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            yield await self.chunks.get()


async def _run() -> list[float]:
    key, private_key = SigningKey.generate(), PrivateKey.generate()
    own = OwnNode("n_self", parse_ip("10.100.255.1"), private_key.public())
    peers = {}
    for number in range(1, PEERS + 1):
        wire = _peer(number)
        mesh_ip = parse_ip(str(wire["mesh_ip"]))
        public_key = PublicKey.parse(str(wire["public_key"]))
        peers[str(wire["id"])] = Peer(
            str(wire["id"]), public_key, mesh_ip, str(wire["endpoint"]), (Prefix.host(mesh_ip),), NO_PRESHARED_KEY
        )
    health = Health()
    identity = Identity("n_self", own.mesh_ip, SecretStr(""), private_key)
    desired = Desired(peers=peers, signing_keys=SigningKeys(bytes(key.verify_key)))
    node = Node(identity, desired, 0.0, health)
    kernel = _TimedKernel(door := Kernel(INTERFACE, "userspace", "wireguard-go"))

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
        )

    converger = Converger(kernel, node, settings, health)
    effects = Effects(node, lambda: own, converger.apply_event, _ignore, _ignore, _ignore, _ignore, _save, _save)
    stream = _Stream()
    listener = Listener(stream, node, Verifier(), effects.handle, _ignore, health, 60.0)
    try:
        result = await converger.converge()
        if result.failed:
            raise RuntimeError(f"{result.failed} changes failed: {health.findings()}")
        await kernel.done.get()
        task = asyncio.create_task(listener.run())
        latencies = []
        for number in range(EVENTS):
            peer = _peer(PEERS + 1 + number % 3)
            kinds = ("peer_added", "peer_endpoint_changed", "peer_removed")
            kind = kinds[number // 3 % 3]
            payload = peer | {"endpoint": f"192.0.2.7:{10_000 + number}"} if kind == "peer_endpoint_changed" else peer
            data = f"id: {number}\ndata: {_seal(key, kind, payload, number)}\n\n".encode()
            started = time.perf_counter()
            stream.chunks.put_nowait(data)
            latencies.append(await kernel.done.get() - started)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    finally:
        await door.tear_down(own.public_key)
        await door.close()
    return latencies


def _ignore(_reason: str) -> None:
    pass


async def _save(_: object) -> None:
    pass


if __name__ == "__main__":
    log.set_up("error", "console")
    for latency in asyncio.run(_run()):
        print(latency)
