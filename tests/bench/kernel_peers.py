"""Peers in bulk in the kernel against `wg`: same boot, same private key, both links up, alternating.

Ours is timed inside a running process, as in the daemon; `wg` is timed as a whole process, as a script would run it.
So that nobody takes the one for the other, a `wg` that does nothing is timed in the same rounds, and each ratio is
given a second time with it subtracted. Plain peers have an IPv4 endpoint and one address; of the mixed ones a third
each has an IPv6 endpoint or none, and a fifth has prefixes of both families. Routes are left out, since `wg` sets none.

Each starts with both interfaces empty and the guest idle: a peer that is added has its handshakes computed in the
background, which would be on the account of whoever comes next. Neither emptying nor waiting is timed. The looks are at
peers without keepalive, since ten thousand whom nobody answers would never stop trying.

Taking an interface down is compared with deleting it, peers and all, which takes the kernel so long that it is done
once, at the smaller number.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from plexd.mesh.address import Endpoint, parse_ip
from plexd.mesh.changes import Change, CreateLink, PutPeer, SetUp
from plexd.mesh.keys import NO_PRESHARED_KEY
from plexd.mesh.plan import plan
from plexd.mesh.target import Target, TargetPeer
from tests.bench.figure import Figure
from tests.kernel.guest import boot
from tests.kernel.image import REPO, kernel_image
from tests.kernel.mesh import INTERFACE, PRIVATE_KEY, mesh_of, numbered_peer, run
from tests.mesh_kernel import MeshKernel

REFERENCE, REFERENCE_PORT = "wgref0", 51999
APPLY_ROUNDS, LOOK_ROUNDS = 5, 15
BUDGET = 1.0
DEADLINE_SECONDS = 1800
IDLE_SECONDS = 0.2
PREFIX = "figure: "


def measure() -> list[Figure]:
    verdict = boot(kernel_image(), [str(REPO / ".venv/bin/python"), "-m", "tests.bench.kernel_peers"], DEADLINE_SECONDS)
    if verdict.status != 0:
        raise RuntimeError(f"the guest did not finish: {verdict.reason or f'exit status {verdict.status}'}")
    lines = verdict.console.splitlines()
    return [Figure(*json.loads(line.removeprefix(PREFIX))) for line in lines if line.startswith(PREFIX)]


async def in_guest() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for kind, make, count in CASES:
            for figure in await _compare(kind, [make(number) for number in range(count)], Path(scratch)):
                print(PREFIX + json.dumps(figure), flush=True)


def _plain_peer(number: int) -> TargetPeer:
    """What most meshes consist of: an IPv4 endpoint, the mesh address and nothing else."""
    peer = numbered_peer(number)
    return peer._replace(
        endpoint=Endpoint(parse_ip(f"192.0.2.{1 + number % 250}"), 1024 + number), allowed_ips=peer.allowed_ips[:1]
    )


async def _compare(kind: str, peers: list[TargetPeer], scratch: Path) -> list[Figure]:
    kernel = MeshKernel(INTERFACE, "kernel", "wireguard-go")
    target = replace(mesh_of(peers), routes=frozenset())
    await _make_links(kernel, target)
    configuration = scratch / "peers.conf"
    configuration.write_text(_wg_configuration(target, REFERENCE_PORT, peers))

    def empty() -> None:
        for interface, port in ((INTERFACE, target.settings.listen_port), (REFERENCE, REFERENCE_PORT)):
            run("wg", "syncconf", interface, "/dev/stdin", stdin=_wg_configuration(target, port, []))

    changes: list[Change] = [
        change for change in plan(target, await kernel.observe(), time.time()) if isinstance(change, PutPeer)
    ]
    assert len(changes) == len(peers)

    async def apply() -> None:
        assert not [outcome for outcome in await kernel.apply(changes) if outcome.error]

    at_rest = replace(target, settings=replace(target.settings, keepalive=0))

    async def fall_silent() -> None:
        for link in (INTERFACE, REFERENCE):
            run("ip", "link", "set", link, "down")
        steps = plan(at_rest, await kernel.observe(), time.time())
        assert not [outcome for outcome in await kernel.apply(steps) if outcome.error]
        run("wg", "syncconf", REFERENCE, "/dev/stdin", stdin=_wg_configuration(at_rest, REFERENCE_PORT, peers))
        run("ip", "link", "set", REFERENCE, "up")

    async def idle_pass() -> None:
        assert not plan(at_rest, await kernel.observe(at_rest.endpoints()), time.time())

    async def noop() -> None:
        _wg("--version")

    async def syncconf() -> None:
        _wg("syncconf", REFERENCE, str(configuration))

    async def show() -> None:
        _wg("show", REFERENCE, "dump")

    applying = await _alternate(APPLY_ROUNDS, empty, noop, apply, syncconf)
    await apply()
    await syncconf()
    mine, reference = (sorted(run("wg", "show", link, "dump").splitlines()[1:]) for link in (INTERFACE, REFERENCE))
    assert mine == reference
    await fall_silent()
    gc.collect()
    gc.freeze()  # as the daemon does once it has its peers (plexd/runtime/garbage.py)
    looking = await _alternate(LOOK_ROUNDS, lambda: None, noop, idle_pass, show)
    gc.unfreeze()
    return [
        *_ratio(f"apply {len(peers)} {kind} peers", "wg syncconf", applying),
        *_ratio(f"pass without change over {len(peers)} {kind} peers", "wg show dump", looking),
        *await _taken_down(kernel, f"{len(peers)} {kind} peers", compare=(kind, len(peers)) == ("plain", 1000)),
    ]


async def _taken_down(kernel: MeshKernel, what: str, *, compare: bool) -> list[Figure]:
    _wait_until_idle()
    begun = time.perf_counter()
    await kernel.tear_down(PRIVATE_KEY.public())
    ours = time.perf_counter() - begun
    if not compare:
        run("wg", "syncconf", REFERENCE, "/dev/stdin", stdin="")
    begun = time.perf_counter()
    run("ip", "link", "delete", REFERENCE)
    theirs = time.perf_counter() - begun
    figures = [Figure(f"interface with {what} taken down", ours * 1000, "ms")]
    if compare:
        figures.append(Figure(f"interface with {what} taken down / ip link delete", ours / theirs, "x", BUDGET))
    return figures


def _ratio(what: str, program: str, times: tuple[float, ...]) -> list[Figure]:
    spawn, ours, theirs = times
    return [
        Figure(what, ours * 1000, "ms"),
        Figure(f"{program} of the same, whole process", theirs * 1000, "ms"),
        Figure("a wg process that does nothing, in the same rounds", spawn * 1000, "ms"),
        Figure(f"{what} / {program}", ours / theirs, "x", BUDGET),
        Figure(f"{what} / {program} less its process", ours / max(theirs - spawn, 1e-9), "x"),
    ]


async def _make_links(kernel: MeshKernel, target: Target) -> None:
    steps = [change for change in plan(target, await kernel.observe(), time.time()) if not isinstance(change, PutPeer)]
    assert isinstance(steps[0], CreateLink)
    assert isinstance(steps[-1], SetUp)
    assert not [outcome for outcome in await kernel.apply(steps) if outcome.error]
    run("ip", "link", "add", REFERENCE, "type", "wireguard")
    run(
        "wg",
        "set",
        REFERENCE,
        "private-key",
        "/dev/stdin",
        "listen-port",
        str(REFERENCE_PORT),
        stdin=PRIVATE_KEY.reveal(),
    )
    run("ip", "link", "set", REFERENCE, "up", "mtu", str(target.settings.mtu))


async def _alternate(
    rounds: int, prepare: Callable[[], None], *contenders: Callable[[], Awaitable[None]]
) -> tuple[float, ...]:
    """The median time of each, in seconds; who goes first changes from round to round."""
    times: list[list[float]] = [[] for _ in contenders]
    for number in range(rounds):
        order = list(zip(contenders, times, strict=True))
        for contender, taken in order if number % 2 else reversed(order):
            prepare()
            _wait_until_idle()
            begun = time.perf_counter()
            await contender()
            taken.append(time.perf_counter() - begun)
            print(f"round {number + 1} of {rounds}: {contender.__name__} {taken[-1]:.2f} s", flush=True)
    return tuple(median(taken) for taken in times)


def _wait_until_idle() -> None:
    """Until the processors of the guest have next to nothing to do, or after a while all the same."""
    for _ in range(50):
        before = _idle_ticks()
        time.sleep(IDLE_SECONDS)
        if _idle_ticks() - before > 0.8 * IDLE_SECONDS * os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1):
            return


def _idle_ticks() -> int:
    return int(Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=5)[4])


def _wg(*arguments: str) -> None:
    """The cheapest way to run a program and wait for it, its output going nowhere."""
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawn("/usr/bin/wg", ["wg", *arguments], os.environ, file_actions=quiet)
    _, status = os.waitpid(pid, 0)
    assert status == 0


def _wg_configuration(target: Target, port: int, peers: Sequence[TargetPeer]) -> str:
    settings = target.settings
    lines = ["[Interface]", f"PrivateKey = {settings.private_key.reveal()}", f"ListenPort = {port}"]
    for peer in peers:
        lines += ["[Peer]", f"PublicKey = {peer.public_key}", f"PersistentKeepalive = {settings.keepalive}"]
        lines.append(f"AllowedIPs = {', '.join(map(str, peer.allowed_ips))}")
        if peer.psk != NO_PRESHARED_KEY:
            lines.append(f"PresharedKey = {base64.b64encode(peer.psk).decode()}")
        if peer.endpoint is not None:
            lines.append(f"Endpoint = {peer.endpoint}")
    return "\n".join(lines) + "\n"


CASES = (("plain", _plain_peer, 1000), ("mixed", numbered_peer, 1000), ("plain", _plain_peer, 10_000))

if __name__ == "__main__":
    sys.exit(asyncio.run(in_guest()))
