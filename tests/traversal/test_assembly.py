"""The search for ways through NATs, over changes of the configuration; in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import pytest

from plexd.config.in_force import Configuration
from plexd.config.load import Loaded
from plexd.config.models import Config
from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.errors import StunError
from plexd.mesh.address import Endpoint, parse_endpoint
from plexd.mesh.events import EndpointOffered
from plexd.mesh.nat import Finding, NatType
from plexd.node.health import Health
from plexd.runtime.supervisor import Groups
from plexd.traversal import assembly
from plexd.traversal.assembly import Traversal
from tests.fakes import FakeKernel
from tests.node_harness import Asked, make_node, settings_of, unix_time

pytestmark = pytest.mark.virtual_time


def finding(text: str, nat_type: NatType) -> Finding:
    endpoint = parse_endpoint(text)
    assert isinstance(endpoint, Endpoint)
    return Finding(endpoint, nat_type)


FOUND = finding("198.51.100.9:40000", NatType.FULL_CONE)
STATED = finding("192.0.2.9:51820", NatType.NONE)


class Plane:
    async def report_endpoint(self, public_endpoint: str, nat_type: str) -> Sequence[EndpointOffered]:
        return ()


class Host(FakeKernel):
    """One whose addresses stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.readdressed = asyncio.Event()

    async def host_addresses(self) -> frozenset[bytes]:
        return frozenset()

    local_addresses = host_addresses


class Stage:
    """STUN servers answer while `answers`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers = True
        stage = self

        class Discovery:
            def __init__(self, *_: object) -> None: ...

            async def discover(self) -> Finding:
                if not stage.answers:
                    raise StunError("nobody answers")
                return FOUND

        monkeypatch.setattr(assembly, "Discovery", Discovery)
        node, kernel = make_node(), Host()
        mesh = build_mesh(kernel, kernel.table, node, settings_of, Health(), unix_time)
        converger = Converger([mesh.resource], Health())
        mesh.resource.up.set()
        self._configuration = Configuration(Config(), lambda: Loaded(Config(), None, {}, ()), contextlib.nullcontext)
        door: Any = kernel
        uplink: Any = Plane()
        self.traversal = Traversal(
            self._configuration,
            Groups(lambda _: None),
            node,
            door,
            uplink,
            mesh.resource,
            converger,
            Asked(),
            Asked(),
            lambda: None,
        )

    async def reload(self, **nat_traversal: object) -> Finding | None:
        """What is known a while after a reload of these keys."""
        self._configuration.current = Config.model_validate({"nat_traversal": nat_traversal})
        self.traversal.component().live["nat_traversal"]()
        await asyncio.sleep(10)
        return self.traversal.finding


@pytest.mark.parametrize(
    ("reloads", "known"),
    [
        pytest.param([{"refresh_interval": "5m"}], FOUND, id="still"),
        pytest.param([{"stun_servers": ("192.0.2.1:3478",)}], FOUND, id="asking others"),
        pytest.param([{"public_endpoint": "192.0.2.9:51820"}], STATED, id="stated"),
        pytest.param([{"public_endpoint": "192.0.2.9:51820"}, {}], None, id="stated no more"),
        pytest.param([{"enabled": False}], None, id="off"),
        pytest.param([{"enabled": False}, {}], None, id="on again"),
    ],
)
async def test_what_was_found_outlives_a_reload_that_does_not_ask_for_something_else(
    monkeypatch: pytest.MonkeyPatch, reloads: list[dict[str, object]], known: Finding | None
) -> None:
    stage = Stage(monkeypatch)
    running = asyncio.create_task(stage.traversal.component().services[0].run())
    await asyncio.sleep(1)
    assert stage.traversal.finding == FOUND
    stage.answers = False
    for keys in reloads:
        now = await stage.reload(**keys)
    running.cancel()
    await asyncio.wait({running})
    assert now == known
