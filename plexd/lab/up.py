"""`plexd lab up`: real nodes in network namespaces, joined to a mesh, damaged, healed and taken down again.

Every step prints what a person can follow, judged by the usual tools: ping through the tunnel, `wg` for handshakes.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

from plexd.errors import PlexdError, PrivilegeError
from plexd.lab.admin import Admin, RegisteredNode
from plexd.lab.namespaces import LabError, Nat, Network
from plexd.lab.nodes import ControlPlaneProcess, NodeProcess, leftovers, remove_leftovers
from plexd.mesh.keys import PrivateKey

LAB = "plexd-lab"
DIRECTORY = Path("/run") / LAB
PATIENCE_SECONDS = 30.0
OPEN_PORT, CLOSED_PORT = 8080, 9090
ALLOW_ALL = [{"id": "everybody", "rules": [{"src": "*", "dst": "*", "port": 0, "protocol": "", "action": "allow"}]}]

T = TypeVar("T")


def up(nodes: int, *, keep: bool, nat: Nat = Nat.NONE, ipv6: bool = False) -> int:
    """Run the lab; 0 when everything happened as it should, 1 otherwise. Raises PrivilegeError without root.

    With `keep` the mesh stays up after the tour, until Ctrl-C.
    """
    _check_host(nat, ipv6=ipv6)
    signal.signal(signal.SIGTERM, _interrupt)
    with _only_lab():
        lab = _Lab(nodes, nat, ipv6=ipv6)
        lab.clean("an earlier lab left")
        try:
            lab.tour()
            if keep:
                lab.stay()
            succeeded = True
        except KeyboardInterrupt:
            say("interrupted")
            succeeded = keep
        except PlexdError as exc:
            say(f"FAILED: {exc}")
            lab.explain()
            succeeded = False
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # taking down goes to the end
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            say("== taking everything down")
            lab.clean("removed")
        if left := leftovers(LAB, DIRECTORY, lab.network):
            say(f"FAILED: left behind: {', '.join(left)}")
            return 1
        say("nothing left behind: no namespace, process, interface or socket of the lab")
        return 0 if succeeded else 1


def say(text: str) -> None:
    print(text, flush=True)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _check_host(nat: Nat, *, ipv6: bool) -> None:
    if ipv6 and nat is not Nat.NONE:
        raise LabError("--ipv6 and --nat do not go together: the lab's NATs are of IPv4")
    if os.geteuid() != 0:
        raise PrivilegeError("the lab makes network namespaces: run it as root (sudo plexd lab up)")
    if not Path("/dev/net/tun").exists() and not Path("/sys/module/wireguard").exists():
        raise LabError(
            "neither /dev/net/tun nor the wireguard module is here: in a container add --device /dev/net/tun"
        )
    if nat is not Nat.NONE and not os.access("/proc/sys/net/ipv4/ip_forward", os.W_OK):
        raise LabError(
            "--nat needs gateways that forward, and /proc/sys is read-only here: run it outside the container"
        )


@contextmanager
def _only_lab() -> Iterator[None]:
    path = Path(f"/run/{LAB}.lock")
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino
        except BlockingIOError:
            ours = False
        if not ours:  # held, or just given up by one that is ending
            raise LabError("another lab is running on this host: end it first (Ctrl-C in its terminal)")
        try:
            yield
        finally:
            path.unlink()


class _Lab:
    def __init__(self, nodes: int, nat: Nat, *, ipv6: bool) -> None:
        if not 2 <= nodes <= Network.MAX_NODES:
            raise LabError(f"--nodes must be 2 to {Network.MAX_NODES}")
        self.network = Network(LAB, nat, ipv6=ipv6)
        self.control_plane = ControlPlaneProcess(self.network, DIRECTORY)
        self.nodes = [
            NodeProcess(n, self.network, DIRECTORY, self.control_plane.url, self.control_plane.tls / "ca.pem", LAB)
            for n in range(1, nodes + 1)
        ]
        self.registered: dict[str, RegisteredNode] = {}  # by host name

    def tour(self) -> None:
        self.build()
        self.register()
        if self.network.nat is not Nat.NONE:
            self.discover()
        self.allow_everybody()
        self.ping_all()
        if self.network.nat is not Nat.SYMMETRIC:  # a peer added anew is found where it was reported to be: not there
            self.sabotage()
        self.one_service_alone()
        self.kill_one()

    def build(self) -> None:
        say(f"== building {len(self.nodes)} nodes and a control plane in network namespaces")
        self.network.build(len(self.nodes))
        DIRECTORY.mkdir(mode=0o700, exist_ok=True)
        self.control_plane.start()
        say(f"control plane at {self.control_plane.url} (in namespace {self.network.hub.name})")
        with Admin(self.control_plane.admin_socket) as admin:
            admin.set_policies([])
            for node in self.nodes:
                node.prepare(admin.issue_token())
                node.start()
        say(f"{len(self.nodes)} agents started, each with a bootstrap token of its own")

    def register(self) -> None:
        say("== registration")
        with Admin(self.control_plane.admin_socket) as admin:
            started = time.monotonic()
            for node in self.nodes:
                self.registered[node.name] = wait_for(
                    f"{node.name} to register", partial(_find, admin, node.name), watched=self.nodes
                )
                seen = self.registered[node.name]
                say(f"{node.name} registered as {seen.node_id}, mesh address {seen.mesh_ip}")
            say(f"all registered within {time.monotonic() - started:.1f} s")

    def discover(self) -> None:
        say("== where STUN servers see the nodes")
        with Admin(self.control_plane.admin_socket) as admin:
            for node in self.nodes:
                seen = wait_for(
                    f"{node.name} to report its endpoint", partial(_find_endpoint, admin, node.name), watched=self.nodes
                )
                say(f"{node.name} reported {seen.endpoint}, NAT {seen.nat_type}")

    def allow_everybody(self) -> None:
        say("== no policy yet: denied by default")
        for node in self.nodes:
            wait_for(f"{node.name} to set up its mesh", partial(self.has_filter, node), watched=self.nodes)
            peers = node.wg("show", node.interface, "peers").split()
            say(f"{node.name}: {len(peers)} peers on its interface, and table inet plexd lets nothing pass")
            if peers:
                raise LabError(f"{node.name} has peers that no policy allows")
        with Admin(self.control_plane.admin_socket) as admin:
            admin.set_policies(ALLOW_ALL)
        say("policy everybody: allow * to * (plexd lab policies shows and sets it)")

    def ping_all(self) -> None:
        say("== every pair through the tunnel")
        for one, other in itertools.permutations(self.nodes, 2):
            if self.network.nat is Nat.SYMMETRIC and self.nodes[0] not in {one, other}:
                say(f"{one.name} -> {other.name} has no direct path: both NATs take another port for every destination")
                continue
            round_trip = wait_for(
                f"{one.name} to reach {other.name}", partial(self.ping, one, other), watched=self.nodes
            )
            age = self.handshake(one, other)
            say(f"{one.name} -> {other.name} {self.mesh_ip(other):<12} {round_trip} ms, handshake {age}")

    def sabotage(self) -> None:
        one, other = self.nodes[0], self.nodes[1]
        with Admin(self.control_plane.admin_socket) as admin:
            known = len(admin.corrections(self.registered[one.name].node_id))
        say(f"== sabotage on {one.name}: removing {other.name} with wg, adding a peer nobody asked for")
        key, foreign = self.public_key(other), str(PrivateKey.generate().public())
        one.wg("set", one.interface, "peer", key, "remove")
        one.wg("set", one.interface, "peer", foreign, "allowed-ips", "10.100.255.1/32")
        say(f"wg set {one.interface} peer {key[:8]}… remove; wg set {one.interface} peer {foreign[:8]}… allowed-ips …")
        started = time.monotonic()

        def healed() -> bool:
            held = one.wg("show", one.interface, "peers").split()
            return key in held and foreign not in held

        wait_for("the mesh to heal", healed, watched=self.nodes)
        round_trip = wait_for(f"{one.name} to reach {other.name}", lambda: self.ping(one, other), watched=self.nodes)
        say(f"healed after {time.monotonic() - started:.1f} s (these nodes look every 2 s), ping {round_trip} ms")
        with Admin(self.control_plane.admin_socket) as admin:
            node_id = self.registered[one.name].node_id
            wanted = {f"peer {self.registered[other.name].node_id}", f"peer key {foreign[:8]}"}

            def reported() -> list[dict[str, str]] | None:
                found = [c for c in admin.corrections(node_id)[known:] if c["detail"] in wanted]
                return found if len(found) >= len(wanted) else None

            corrections = wait_for("the drift report", reported, watched=self.nodes)
        for correction in corrections:
            say(f"drift reported to the control plane: {correction['type']}: {correction['detail']}")
        one.namespace.run("nft", "flush", "ruleset")
        started = time.monotonic()
        wait_for("the firewall to be back", partial(self.has_filter, one), watched=self.nodes)
        say(f"nft flush ruleset: table inet plexd is back after {time.monotonic() - started:.2f} s")

    def one_service_alone(self) -> None:
        client, server = self.nodes[0], self.nodes[1]
        stranger = self.nodes[2] if len(self.nodes) > 2 and self.network.nat is not Nat.SYMMETRIC else None
        say(f"== policy: {client.name} may reach TCP port {OPEN_PORT} of {server.name}, and nothing else goes anywhere")
        ids = [self.registered[node.name].node_id for node in (client, server)]
        rule = {"src": ids[0], "dst": ids[1], "port": OPEN_PORT, "protocol": "tcp", "action": "allow"}
        with Admin(self.control_plane.admin_socket) as admin:
            admin.set_policies([{"id": "one-service", "rules": [rule]}])
            with self.conversation(server, "answer", str(OPEN_PORT), str(CLOSED_PORT)) as answering:
                read_line(answering)
                where = self.mesh_ip(server)

                def refused(one: NodeProcess, port: int) -> bool:
                    with self.conversation(one, "talk", where, str(port)) as attempt:
                        return read_line(attempt) == "no answer"

                wait_for("the policy to be in force", partial(refused, client, CLOSED_PORT), watched=self.nodes)
                say(f"{client.name} -> {server.name} port {CLOSED_PORT}: no answer")
                if stranger is not None:
                    wait_for(
                        f"{stranger.name} to be kept out", partial(refused, stranger, OPEN_PORT), watched=self.nodes
                    )
                    say(f"{stranger.name} -> {server.name} port {OPEN_PORT}: no answer")
                with self.conversation(client, "talk", where, str(OPEN_PORT)) as talking:
                    if (verdict := read_line(talking)) != "connected":
                        raise LabError(f"{client.name} -> {server.name} port {OPEN_PORT}: {verdict}")
                    say(f"{client.name} -> {server.name} port {OPEN_PORT}: connected, and talking")
                    admin.set_policies([])
                    say(f"policy withdrawn; the open connection is {read_line(talking)}")
            admin.set_policies(ALLOW_ALL)
        say("policy everybody again")
        wait_for(f"{client.name} to reach {server.name}", partial(self.ping, client, server), watched=self.nodes)
        wait_for(
            f"{client.name} to reach {self.nodes[-1].name}",
            partial(self.ping, client, self.nodes[-1]),
            watched=self.nodes,
        )

    def kill_one(self) -> None:
        one, victim = self.nodes[0], self.nodes[-1]
        say(f"== killing the agent of {victim.name} (SIGKILL) under a ping every 100 ms, then starting it again")
        pinging = subprocess.Popen(
            one.namespace.command("ping", "-n", "-i", "0.1", self.mesh_ip(victim)), stdout=subprocess.PIPE, text=True
        )
        try:
            time.sleep(0.5)
            victim.kill()
            say(f"killed; {victim.name} is without an agent, its tunnels stay")
            time.sleep(1.0)
            victim.start()
            with Admin(self.control_plane.admin_socket) as admin:
                node_id = self.registered[victim.name].node_id
                before = admin.heartbeats(node_id)
                wait_for("the agent to be back", lambda: admin.heartbeats(node_id) > before, watched=self.nodes)
            time.sleep(0.5)
        finally:
            pinging.send_signal(signal.SIGINT)
            output = pinging.communicate()[0]
        counts = re.search(r"(\d+) packets transmitted, (\d+) received", output)
        if counts is None:
            raise LabError(f"ping printed no summary: {output[-300:]}")
        sent, received = map(int, counts.groups())
        say(f"agent is back, adopted the interface; pings sent {sent}, lost {sent - received}")
        if sent != received:
            raise LabError(f"{sent - received} of {sent} pings were lost while the agent was away")

    def stay(self) -> None:
        say("== the mesh is up; Ctrl-C takes it down. To look around:")
        first = self.nodes[0]
        say(f"   ip netns exec {first.namespace.name} wg show {first.interface}")
        say(f"   ip netns exec {first.namespace.name} ping {self.mesh_ip(self.nodes[-1])}")
        say(f"   ip netns exec {first.namespace.name} nft list table inet plexd")
        say(f"   plexd policies --socket {first.api_socket}")
        say("   plexd lab policies policies.json, to change who may talk to whom")
        say(f"   tail -f {first.log}")
        while all(node.is_running() for node in self.nodes):
            time.sleep(1)
        raise LabError("an agent ended")

    # what the steps look at

    def mesh_ip(self, node: NodeProcess) -> str:
        return self.registered[node.name].mesh_ip

    def public_key(self, node: NodeProcess) -> str:
        return node.wg("show", node.interface, "public-key").strip()

    def has_filter(self, node: NodeProcess) -> bool:
        try:
            node.namespace.run("nft", "list", "table", "inet", "plexd")
            node.wg("show", node.interface)
        except LabError:
            return False
        return True

    @contextmanager
    def conversation(self, node: NodeProcess, *words: str) -> Iterator[subprocess.Popen[str]]:
        """One side of `plexd.lab.conversation`, ended with the block."""
        command = node.namespace.command(sys.executable, "-m", "plexd.lab.conversation", *words)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def ping(self, one: NodeProcess, other: NodeProcess) -> str | None:
        """The round trip in ms, None when no answer came within a second."""
        done = subprocess.run(
            one.namespace.command("ping", "-n", "-c", "1", "-W", "1", self.mesh_ip(other)),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        found = re.search(r"time=([0-9.]+) ms", done.stdout)
        return found[1] if done.returncode == 0 and found else None

    def handshake(self, one: NodeProcess, other: NodeProcess) -> str:
        """The age of the last handshake as `wg` knows it."""
        key = self.public_key(other)
        lines = one.wg("show", one.interface, "latest-handshakes").splitlines()
        at = next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)
        return f"{max(0, int(time.time()) - at)} s ago" if at else "never"

    # ending

    def clean(self, what: str) -> None:
        found = remove_leftovers(LAB, DIRECTORY, self.network)
        if found and what:
            say(f"{what}: {', '.join(found)}")

    def explain(self) -> None:
        """What the agents said last, before it is gone."""
        for node in self.nodes:
            if node.log.exists():
                say(f"-- last lines of {node.name}:\n{node.last_log_lines()}")


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None  # noqa: S101 - started with a pipe
    return process.stdout.readline().strip()


def _find(admin: Admin, hostname: str) -> RegisteredNode | None:
    return next((node for node in admin.nodes() if node.hostname == hostname), None)


def _find_endpoint(admin: Admin, hostname: str) -> RegisteredNode | None:
    node = _find(admin, hostname)
    return node if node is not None and node.endpoint else None


def wait_for(what: str, look: Callable[[], T | None], *, watched: list[NodeProcess]) -> T:
    """Look until there is something to see. Raises LabError after 30 s, or when a watched agent has ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (seen := look()):
        for node in watched:
            if not node.is_running():
                raise LabError(f"the agent of {node.name} ended while waiting for {what}")
        if time.monotonic() > deadline:
            raise LabError(f"waited {PATIENCE_SECONDS:.0f} s for {what}")
        time.sleep(0.05)
    return seen
