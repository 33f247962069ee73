"""From damage done with `ip` and `nft` to its repair, and what passes over a sound mesh write.

Notifications, repair loop and converger are the daemon's own. The WireGuard is a real `wireguard-go`, in a namespace:
`ip netns exec NAME python -m tests.bench.damage` prints what `measure` reads.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time

from pydantic import SecretStr

from plexd import log
from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.converge.repair import Repair
from plexd.mesh import firewall
from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.desired import Desired, Peer, Policy, PolicyRule
from plexd.mesh.events import PeerAdded
from plexd.mesh.keys import NO_PRESHARED_KEY, PrivateKey, PublicKey
from plexd.mesh.observed import Backend
from plexd.mesh.target import Settings
from plexd.node.health import Health
from plexd.node.state import Node
from plexd.store.identity import Identity
from tests.bench.figure import Figure, percentile
from tests.mesh_kernel import MeshKernel

NAMESPACE = "plexd-bench-damage"
INTERFACE = "plexdbench1"
PEERS = 100
ROUNDS = 10  # of each kind: one more in a minute would be taken for a fight
IDLE_PASSES = 100
DAMAGE = {
    "link deleted": "ip link delete {0}",
    "link down": "ip link set {0} down",
    "MTU changed": "ip link set {0} mtu 1300",
    "address deleted": "ip address delete 10.100.255.1/32 dev {0}",
    "route deleted": "ip route delete 10.100.0.7/32 dev {0}",
    "ruleset flushed": "nft flush ruleset",
}
EVERYBODY = Policy("everybody", (PolicyRule("*", "*", 0, "", "allow"),))


def measure() -> list[Figure]:
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
    try:
        for words in ("link set lo up", "route add default dev lo mtu 1500"):
            subprocess.run(["ip", "-n", NAMESPACE, *words.split()], check=True)
        command = ["ip", "netns", "exec", NAMESPACE, sys.executable, "-m", "tests.bench.damage"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        subprocess.run(["ip", "netns", "delete", NAMESPACE], check=True)
    seconds, writes = json.loads(done.stdout.splitlines()[-1])
    every = [value * 1000 for values in seconds.values() for value in values]
    return [
        Figure(f"damage to repair, {PEERS} peers, all kinds, median", statistics.median(every), "ms", 100),
        Figure(f"damage to repair, {PEERS} peers, all kinds, p99", percentile(every, 99), "ms"),
        *(
            Figure(f"damage to repair, {PEERS} peers, {kind}, median", statistics.median(values) * 1000, "ms", 100)
            for kind, values in seconds.items()
        ),
        Figure(f"writes of {IDLE_PASSES} passes over a sound mesh", writes, "", 0),
    ]


def _peer(number: int) -> Peer:
    mesh_ip, endpoint = parse_ip(f"10.100.0.{number}"), f"192.0.2.{number}:51820"
    key = PublicKey(bytes([number] * 32))
    return Peer(f"n_{number}", key, mesh_ip, endpoint, (Prefix.host(mesh_ip),), NO_PRESHARED_KEY)


async def _run() -> tuple[dict[str, list[float]], int]:
    private_key = PrivateKey.generate()
    health = Health()
    identity = Identity("n_self", parse_ip("10.100.255.1"), SecretStr(""), private_key)
    node = Node(identity, Desired(policies=(EVERYBODY,)), 0.0, health)
    for number in range(1, PEERS + 1):
        node.fold(PeerAdded(_peer(number)))
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
    started = asyncio.Event()
    started.set()
    loops: list[asyncio.Task[None]] = []
    seconds: dict[str, list[float]] = {kind: [] for kind in DAMAGE}
    try:
        result = await converger.converge()
        if result.failed:
            raise RuntimeError(f"{result.failed} changes failed: {health.findings()}")
        kernel.mesh.is_wanted = mesh.wanted.is_wanted
        repair = Repair(kernel, converger, started, lambda _: done.put_nowait(time.perf_counter()))
        watches = (kernel.watch(), kernel.watch_firewall())
        loops = [asyncio.create_task(loop) for loop in (*watches, repair.run())]
        for _ in range(ROUNDS):
            for kind, command in DAMAGE.items():
                await asyncio.sleep(0.3)  # the look that the last repair earned is over
                begun = time.perf_counter()
                process = await asyncio.create_subprocess_exec(*command.format(INTERFACE).split())
                if await process.wait():
                    raise RuntimeError(f"{command} failed")
                # nft is held up at its end, long after the damage is done
                at = begun if command.startswith("nft") else time.perf_counter()
                async with asyncio.timeout(10):
                    while (ended := await done.get()) < at:  # of the pass before
                        pass
                seconds[kind].append(ended - at)
        await asyncio.sleep(0.3)
        before = kernel.netlink_writes
        for _ in range(IDLE_PASSES):
            await converger.converge()
        return seconds, kernel.netlink_writes - before
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        await kernel.tear_down(private_key.public())
        await kernel.close()


if __name__ == "__main__":
    log.set_up("error", "console")
    print(json.dumps(asyncio.run(_run())))
