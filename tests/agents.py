"""Real agents and a real control plane, each in a network namespace of its own; nothing of it is left afterwards."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from plexd.lab.admin import Admin
from plexd.lab.namespaces import Network
from plexd.lab.nodes import ControlPlaneProcess, NodeProcess, remove_leftovers


class Agents(NamedTuple):
    """Nothing of it runs yet."""

    network: Network
    plane: ControlPlaneProcess
    nodes: list[NodeProcess]

    def prepare(self) -> None:
        """Afterwards the control plane runs, and each agent has what it needs to start and register."""
        self.plane.start()
        with Admin(self.plane.admin_socket) as admin:
            for node in self.nodes:
                node.prepare(admin.issue_token())


@contextlib.contextmanager
def agents(lab: str, number: int = 2) -> Iterator[Agents]:
    """`lab` begins the names of namespaces and interfaces: no other test has it."""
    directory = Path(tempfile.mkdtemp(prefix=lab))
    network = Network(lab)
    plane = ControlPlaneProcess(network, directory)
    ca = plane.tls / "ca.pem"
    nodes = [NodeProcess(1 + index, network, directory, plane.url, ca, lab) for index in range(number)]
    try:
        network.build(number)
        yield Agents(network, plane, nodes)
    finally:
        remove_leftovers(lab, directory, network)
        for process in (plane._process, *(node._process for node in nodes)):
            if process is not None:
                process.wait(30)
        shutil.rmtree(directory, ignore_errors=True)
