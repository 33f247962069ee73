"""The processes of the lab: a control plane in the hub, a real `plexd up` in each node's namespace."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from plexd.lab.namespaces import UAPI_SOCKETS, LabError, Namespace, Nat, Network

MESH_CIDR, MESH_CIDR_IPV6 = "10.100.0.0/16", "fd00:100::/64"
PORT = 8443
MESH_PORT = 51820
STUN_PORT = 3478
PATIENCE_SECONDS = 60.0  # with a control plane that starts: on an emulated machine its imports alone take 20 s


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for the lab, which then ends them in order
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": "/root"},
        )


class ControlPlaneProcess:
    """`plexd lab controlplane` in the hub; its admin socket is a file and so reaches out of the namespace."""

    def __init__(self, network: Network, directory: Path) -> None:
        self.tls = directory / "tls"
        self.admin_socket = directory / "admin.sock"
        self._listen = _authority(network.address(0), PORT)
        self.url = f"https://{self._listen}"
        self.log = directory / "controlplane.log"
        self._hub = network.hub
        self._mesh_cidr = MESH_CIDR_IPV6 if network.ipv6 else MESH_CIDR
        self._process: subprocess.Popen[bytes] | None = None
        self._stun = stun_servers(network)

    def start(self) -> None:
        self._process = _start(
            self._hub.command(
                sys.executable, "-m", "plexd", "lab", "controlplane",
                "--listen", self._listen,
                "--tls-dir", str(self.tls),
                "--admin-socket", str(self.admin_socket),
                "--mesh-cidr", self._mesh_cidr,
                *(word for server in self._stun for word in ("--stun", server)),
            ),
            self.log,
        )  # fmt: skip
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.admin_socket.is_socket():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"the control plane did not start:\n{self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)


class NodeProcess:
    """One node: its namespace, its directory, and the agent that runs in it."""

    def __init__(self, number: int, network: Network, directory: Path, api: str, ca_file: Path, lab: str) -> None:
        self.name = f"node-{number}"
        self.number = number
        self.namespace: Namespace = network.node(number)
        self.interface = f"{lab}{number}"
        self.directory = directory / self.name
        self.log = self.directory / "log"
        self.api_socket = self.directory / "api.sock"
        self._config = f"""\
api: {api}
tls:
  ca_file: {ca_file}
data_dir: {self.directory / "data"}
hostname: {self.name}
token:
  file: {self.directory / "token"}
mesh:
  interface: {self.interface}
  listen_port: {MESH_PORT}
nat_traversal: {{{_nat_traversal(network, number)}}}
node_api:
  socket: {self.api_socket}
heartbeat:
  interval: 5s
reconcile:
  interval: 2s
"""
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self, token: str) -> None:
        self.directory.mkdir(mode=0o700)
        (self.directory / "config.yaml").write_text(self._config)
        token_file = self.directory / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(token)

    def start(self) -> None:
        self._process = _start(
            self.namespace.command(
                sys.executable, "-m", "plexd", "up", "--config", str(self.directory / "config.yaml")
            ),
            self.log,
        )

    @property
    def pid(self) -> int:
        """Of the agent; `ip netns exec` replaces itself by it."""
        if self._process is None:
            raise LabError(f"{self.name} was never started")
        return self._process.pid

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, as the out-of-memory killer would."""
        os.kill(self.pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def wg(self, *arguments: str) -> str:
        return self.namespace.run("wg", *arguments)

    def last_log_lines(self, count: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])


def stun_servers(network: Network) -> list[str]:
    """Where the control plane answers STUN; without NATs every node knows its endpoint."""
    return [] if network.nat is Nat.NONE else [f"{address}:{STUN_PORT}" for address in network.STUN_ADDRESSES]


def _nat_traversal(network: Network, number: int) -> str:
    if network.nat is Nat.NONE:
        return f'public_endpoint: "{_authority(network.address(number), MESH_PORT)}"'
    return f"refresh_interval: 10s, stun_servers: [{', '.join(stun_servers(network))}]"


def _authority(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def leftovers(lab: str, directory: Path, network: Network) -> list[str]:
    """What is still there of the lab: namespaces, processes, sockets, files."""
    left = [f"namespace {namespace.name}" for namespace in network.namespaces()]
    ours = Path("/proc/self/ns/pid").readlink()  # a lab in a container on this host is not this lab
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline.read_bytes().decode(errors="replace").split("\0")
            if cmdline.with_name("ns").joinpath("pid").readlink() != ours:
                continue
        except OSError:  # gone meanwhile, or none of our business
            continue
        if any(word.startswith(f"{directory}/") or re.fullmatch(rf"{lab}\d+", word) for word in words):
            left.append(f"process {cmdline.parent.name} ({' '.join(words).strip()})")
    left += map(str, UAPI_SOCKETS.glob(f"{lab}*.sock")) if UAPI_SOCKETS.is_dir() else []
    return left + ([str(directory)] if directory.exists() else [])


def remove_leftovers(lab: str, directory: Path, network: Network) -> list[str]:
    """Take down what this or an earlier lab left; what was found, for a line of progress."""
    found = [namespace.name for namespace in network.namespaces()]
    network.remove()
    if directory.exists():
        found.append(str(directory))
        shutil.rmtree(directory)
    if UAPI_SOCKETS.is_dir():
        for socket in UAPI_SOCKETS.glob(f"{lab}*.sock"):
            socket.unlink()
            found.append(str(socket))
    return found
