"""`plexd lab up --nat`, as a newcomer sees it."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.namespaces import marks

pytestmark = marks("nft", seconds=300, routers=True)


def tour(nat: str, nodes: int) -> str:
    command = [sys.executable, "-m", "plexd", "lab", "up", "--nodes", str(nodes), "--nat", nat]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing left behind" in done.stdout
    return done.stdout


def test_nodes_behind_cone_nats_find_and_reach_each_other() -> None:
    output = tour("full-cone", 2)
    assert re.findall(r"(node-\d) reported (\S+), NAT (\S+)\n", output) == [
        ("node-1", "192.0.2.2:51820", "full_cone"),
        ("node-2", "192.0.2.3:51820", "full_cone"),
    ]
    assert len(re.findall(r"node-\d -> node-\d .* ms, handshake \d+ s ago", output)) == 2
    assert re.search(r"healed after [0-9.]+ s", output)
    assert re.search(r"pings sent [1-9]\d+, lost 0", output)


def test_node_in_the_open_is_reached_from_behind_symmetric_nats() -> None:
    output = tour("symmetric", 3)
    types = dict(re.findall(r"(node-\d) reported \S+, NAT (\S+)\n", output))
    assert types == {"node-1": "none", "node-2": "symmetric", "node-3": "symmetric"}
    assert len(re.findall(r"node-1 -> node-[23] .* ms|node-[23] -> node-1 .* ms", output)) == 4
    assert output.count("has no direct path") == 2
