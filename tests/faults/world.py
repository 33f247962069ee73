"""A namespace of its own with a control plane and one real agent in it, and `wg` as the judge."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from plexd.mesh.keys import PresharedKey, PrivateKey
from tests.faults.plane import Plane
from tests.namespaces import marks

PATIENCE = 45.0  # seconds; the machine may be busy
PLEXD = (sys.executable, "-m", "plexd")
_numbers = itertools.count(1)

MARKS = marks("wg", seconds=240)


def wait_until(what: str, holds: Callable[[], object], patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline, f"did not happen in {patience:.0f} s: {what}"
        time.sleep(0.05)


class Peer:
    """A peer nobody hears from; only what the kernel holds of it counts."""

    def __init__(self, number: int) -> None:
        self.id = f"n_{number}"
        self.private_key = PrivateKey.generate()
        self.psk = PresharedKey(os.urandom(32))
        self.public_key = str(self.private_key.public())
        self.wire = {
            "id": self.id,
            "public_key": self.public_key,
            "mesh_ip": f"10.101.0.{number}",
            "endpoint": f"127.0.0.1:{20000 + number}",
            "allowed_ips": [f"10.101.0.{number}/32"],
            "psk": self.psk.reveal(),
        }


class World:
    """A context manager; all of it is gone afterwards. `mesh` are further lines of that configuration section,
    `extra` further sections."""

    def __init__(self, directory: Path, mesh: str = "  backend: userspace", extra: str = "") -> None:
        number = next(_numbers)
        self.directory = directory
        self.namespace = f"plxf-{os.getpid()}-{number}"
        self.interface = f"pf{os.getpid() % 1_000_000}x{number}"
        self.inside = ["ip", "netns", "exec", self.namespace]
        self.data = directory / "data"
        self.output = directory / "agent.log"
        self.plane = Plane(directory, inside=self.inside)
        self.peers: list[Peer] = []
        self.node_id = ""
        self._mesh = mesh
        self._extra = extra
        self._agent: subprocess.Popen[bytes] | None = None
        self._executions = itertools.count(1)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            run("ip", "netns", "add", self.namespace)
            undo.callback(self._remove_namespace)
            run("ip", "-n", self.namespace, "link", "set", "lo", "up")
            undo.enter_context(self.plane)
            undo.callback(self.kill_agent)
            self.write_config()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def write_config(self) -> None:
        (self.directory / "config.yaml").write_text(f"""\
api: {self.plane.url}
data_dir: {self.data}
hostname: node-under-test
log_level: debug
log_format: json
token:
  file: {self.directory / "token"}
policy:
  enabled: false
reconcile:
  interval: 1s
heartbeat:
  interval: 5s
mesh:
  interface: {self.interface}
{self._mesh}
node_api:
  socket: {self.directory / "api.sock"}
{self._extra}""")

    def put_token(self, text: str) -> None:
        token = self.directory / "token"
        token.touch(0o600)
        token.write_text(text)

    # the agent

    def start_agent(self, *through: str, **environ: str) -> None:
        """`through` are words that run the rest of the command."""
        with self.output.open("ab") as output:
            self._agent = subprocess.Popen(
                [*self.inside, *through, *PLEXD, "up", "--config", str(self.directory / "config.yaml")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PATH": os.environ["PATH"], **environ},
            )

    def end_agent(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.signal_agent(number)
        return self.wait_for_agent()

    def signal_agent(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self._agent is not None
        self._agent.send_signal(number)

    def wait_for_agent(self) -> int:
        """The exit code."""
        assert self._agent is not None
        return self._agent.wait(60)

    def kill_agent(self) -> None:
        if self._agent is not None and self._agent.poll() is None:
            self._agent.kill()
            self._agent.wait(20)

    @property
    def agent_pid(self) -> int:
        assert self._agent is not None
        return self._agent.pid

    def is_alive(self) -> bool:
        return self._agent is not None and self._agent.poll() is None

    def log(self) -> Iterator[dict[str, Any]]:
        for line in self.output.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    def said(self, message: str, **keys: Any) -> list[dict[str, Any]]:
        return [line for line in self.log() if line["message"] == message and keys.items() <= line.items()]

    def pids(self) -> set[int]:
        return {int(pid) for pid in run("ip", "netns", "pids", self.namespace).split()}

    # the mesh

    def set_peers(self, *peers: Peer) -> None:
        """What the next state pulls say."""
        self.peers = list(peers)
        wire = [peer.wire for peer in peers]
        self.plane.ask("PATCH", f"/nodes/{self.node_id}/state", {"members": {"peers": wire}})

    def wg(self) -> dict[str, list[str]]:
        """The peers of `wg show … dump` by public key, as PSK, endpoint, allowed IPs …; none without an interface."""
        done = subprocess.run(
            [*self.inside, "wg", "show", self.interface, "dump"], capture_output=True, text=True, check=False
        )
        fields = [line.split("\t") for line in done.stdout.splitlines()[1:]]
        return {words[0]: words[1:] for words in fields}

    def mesh_is_whole(self) -> bool:
        held = {key: fields[:3] for key, fields in self.wg().items()}
        return held == {
            peer.public_key: [peer.psk.reveal(), peer.wire["endpoint"], *peer.wire["allowed_ips"]]
            for peer in self.peers
        }

    def lose_a_peer(self) -> str:
        """Somebody removes one by hand; the id of it."""
        peer = self.peers[0]
        run(*self.inside, "wg", "set", self.interface, "peer", peer.public_key, "remove")
        return peer.id

    def streams(self) -> int:
        return int(self.plane.ask("GET", f"/nodes/{self.node_id}")["streams"])

    def emit(self, event_type: str, payload: Any = None, **how: Any) -> None:
        self.plane.ask("POST", f"/nodes/{self.node_id}/events", {"event_type": event_type, "payload": payload, **how})

    def emit_action(self, **how: Any) -> str:
        """An event whose effect only an event can have; the execution to look for in the acknowledgements."""
        execution = f"x-{os.getpid()}-{next(self._executions)}"
        self.emit("action_request", {"execution_id": execution, "action": "gather_info"}, **how)
        return execution

    def wait_for_ack(self, execution: str) -> None:
        (ack,) = self.plane.wait_for("ack", contains={"execution_id": execution}, timeout=PATIENCE)
        assert (ack["body"]["status"], ack["body"]["reason"]) == ("rejected", "actions_disabled")

    def register(self) -> None:
        """Token, agent, three peers, a whole mesh."""
        self.put_token(self.plane.issue_token())
        self.start_agent()
        self.plane.wait_for("register", timeout=PATIENCE)
        (node,) = self.plane.nodes()
        self.node_id = node["id"]
        self.set_peers(*(Peer(number) for number in (2, 3, 4)))
        wait_until("three peers in the kernel", self.mesh_is_whole)
        wait_until("the event stream is open", self.streams)
        self.wait_for_ack(self.emit_action())

    # the end

    def _remove_namespace(self) -> None:
        run("ip", "netns", "pids", self.namespace)
        subprocess.run(["ip", "-n", self.namespace, "link", "delete", self.interface], check=False, capture_output=True)
        deadline = time.monotonic() + 10
        while (pids := self.pids()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        run("ip", "netns", "delete", self.namespace)
        Path(f"/var/run/wireguard/{self.interface}.sock").unlink(missing_ok=True)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
