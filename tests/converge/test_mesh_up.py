"""What others learn from the converger about the interface: that it is there, and that it was made."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.errors import ForeignLink, KernelError, NotAddressable, NotPermitted
from plexd.mesh.observed import Backend
from plexd.node.health import Condition, Health, RaisedCondition
from tests.fakes import FakeKernel
from tests.node_harness import make_identity, make_node, peer, settings_of, unix_time

pytestmark = pytest.mark.virtual_time


async def test_interface_is_told_when_it_is_made_and_when_it_is_made_again() -> None:
    kernel, made = FakeKernel(), 0
    mesh = build_mesh(kernel, kernel.table, make_node(peer(2)), settings_of, Health(), unix_time)
    converger = Converger([mesh.resource], Health())

    def count() -> None:
        nonlocal made
        made += 1

    mesh.resource.on_created = count
    assert not mesh.resource.up.is_set()
    await converger.converge()
    assert (mesh.resource.up.is_set(), made) == (True, 1)
    await converger.converge()
    assert (mesh.resource.up.is_set(), made) == (True, 1)
    kernel.delete_link()
    await converger.converge()
    assert (mesh.resource.up.is_set(), made) == (True, 2)


async def test_adopted_interface_was_not_made() -> None:
    kernel, made = FakeKernel(), []
    before = build_mesh(kernel, kernel.table, make_node(peer(2)), settings_of, Health(), unix_time)
    await Converger([before.resource], Health()).converge()
    mesh = build_mesh(kernel, kernel.table, make_node(peer(2)), settings_of, Health(), unix_time)
    converger = Converger([mesh.resource], Health())
    mesh.resource.on_created = lambda: made.append(True)
    await converger.converge()
    assert (mesh.resource.up.is_set(), made) == (True, [])


async def test_mesh_is_not_up_while_the_link_is_somebody_elses_or_the_key_is_lost() -> None:
    kernel, node = FakeKernel(), make_node(peer(2))
    mesh = build_mesh(kernel, kernel.table, node, settings_of, Health(), unix_time)
    converger = Converger([mesh.resource], Health())
    await converger.converge()
    kernel.delete_link()
    kernel.make_link(Backend.KERNEL, alias="somebody's")
    await converger.converge()
    assert not mesh.resource.up.is_set()
    kernel.delete_link()
    await converger.converge()
    assert mesh.resource.up.is_set()
    node.rotate(make_identity(private_key=None))
    await converger.converge()
    assert not mesh.resource.up.is_set()


@pytest.mark.virtual_time
async def test_look_that_fails_says_nothing_against_a_mesh_that_stands() -> None:
    with capture_logs() as lines:
        kernel, health = FakeKernel(), Health(lambda: 1000.0)
        mesh = build_mesh(kernel, kernel.table, make_node(peer(2)), settings_of, health, unix_time)
        converger = Converger([mesh.resource], health)
        await converger.converge()
        kernel.failure = KernelError("could not look at the interface: no answer within 5 s")
        for again in (converger.converge, converger.repair):
            assert (await again()).failed == 1
            assert mesh.resource.up.is_set()
            assert not converger.clean.is_set()
            assert health.findings() == (RaisedCondition(Condition.CHANGES_FAILED, str(kernel.failure), 1000.0),)
        kernel.failure = None
        assert (await converger.converge()).failed == 0
        assert health.findings() == ()
    failed = [line for line in lines if line["log_level"] == "error" and line.get("component") == "mesh"]
    assert [line["event"] for line in failed] == ["mesh not looked at"]
    assert failed[0]["error"].endswith("no answer within 5 s")


async def test_look_that_fails_before_there_was_a_mesh_leaves_it_down() -> None:
    kernel, health = FakeKernel(), Health()
    mesh = build_mesh(kernel, kernel.table, make_node(peer(2)), settings_of, health, unix_time)
    converger = Converger([mesh.resource], health)
    kernel.failure = KernelError("could not look at the interface: no answer within 5 s")
    await converger.converge()
    assert not mesh.resource.up.is_set()
    conditions = {finding.condition: finding.detail for finding in health.findings()}
    assert conditions == dict.fromkeys((Condition.MESH_DOWN, Condition.CHANGES_FAILED), str(kernel.failure))


@pytest.mark.parametrize("error", [ForeignLink, NotAddressable, NotPermitted])
async def test_look_that_shows_that_there_can_be_no_mesh_says_so(error: type[KernelError]) -> None:
    kernel, health = FakeKernel(), Health()
    mesh = build_mesh(kernel, kernel.table, make_node(peer(2)), settings_of, health, unix_time)
    converger = Converger([mesh.resource], health)
    await converger.converge()
    kernel.failure = error("it cannot be")
    await converger.converge()
    assert not mesh.resource.up.is_set()
    assert {finding.condition for finding in health.findings()} == {
        Condition.MESH_DOWN,
        Condition.CHANGES_FAILED,
    }


async def test_link_that_was_made_and_got_no_port_is_no_mesh_in_the_heartbeat() -> None:
    kernel = FakeKernel()
    mesh = build_mesh(kernel, kernel.table, make_node(peer(2)), settings_of, Health(), unix_time)
    converger = Converger([mesh.resource], Health())
    kernel.make_link(Backend.KERNEL)  # by a pass that got no further
    assert await mesh.view.status() is None
    await converger.converge()
    status = await mesh.view.status()
    assert status is not None
    assert status.listen_port == kernel.listen_port != 0
