"""What the telemetry component connects."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from plexd.config.load import load
from plexd.identity.enrolment import make_control_plane
from plexd.mesh.desired import Desired
from plexd.node.control_calls import SelfDescription
from plexd.telemetry import assembly
from plexd.telemetry.assembly import Telemetry
from plexd.telemetry.pipeline import Pipeline
from tests.node_harness import make_node

if TYPE_CHECKING:
    from plexd.telemetry.metrics import Mesh

CONFIG = """\
api: https://cp.example.net
data_dir: {directory}
"""


async def test_every_pipeline_hears_that_the_identity_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(assembly, "add_listener", lambda listener: None)  # which would outlive the test
    monkeypatch.setattr(Pipeline, "node_renewed", lambda pipeline: heard.append(pipeline.name))
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(directory=tmp_path))
    config = load({"config": str(file)}, {}).config
    description = SelfDescription("node-1", {}, "0.1.0", "sha256:00")
    node, mesh = make_node(), cast("Mesh", None)  # nobody looks at the mesh here
    telemetry = Telemetry(lambda: config, make_control_plane(config), description, asyncio.Event())
    telemetry.component(node, mesh)
    node.renew(node.identity, Desired(), 0.0)
    assert sorted(heard) == ["audit", "logs", "metrics"]
