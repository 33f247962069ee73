"""Two whole agents on hosts without IPv6: nothing of what they do beside the mesh needs it either."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kernel.agents import two_agents

pytestmark = pytest.mark.timeout(400)


def test_agents_register_reach_each_other_and_have_nothing_to_complain_about(tmp_path: Path) -> None:
    with two_agents(tmp_path) as mesh:
        mesh.wait_until_both_reach_each_other()
        for node in (mesh.one, mesh.other):
            status = mesh.status(node)
            assert (status["state"], status["conditions"]) == ("connected", [])
            assert "EAFNOSUPPORT" not in (log := node.log.read_text())
            assert "Address family not supported" not in log
            assert [line for line in map(json.loads, log.splitlines()) if line["level"] == "error"] == []
