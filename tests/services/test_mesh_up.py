"""What others learn from the converger about the interface: that it is there, and that it was made."""

from __future__ import annotations

from plexd.converge import Converger
from plexd.health import Health
from plexd.mesh.observed import Backend
from tests.fakes import FakeKernel
from tests.services.stage import make_identity, make_node, peer, settings_of, unix_time
from tests.virtual_time import run_virtual


def test_interface_is_told_when_it_is_made_and_when_it_is_made_again() -> None:
    async def main() -> None:
        kernel, made = FakeKernel(), 0
        converger = Converger(kernel, make_node(peer(2)), settings_of, Health(), unix_time)

        def count() -> None:
            nonlocal made
            made += 1

        converger.on_created = count
        assert not converger.up.is_set()
        await converger.converge()
        assert (converger.up.is_set(), made) == (True, 1)
        await converger.converge()
        assert (converger.up.is_set(), made) == (True, 1)
        kernel.delete_link()
        await converger.converge()
        assert (converger.up.is_set(), made) == (True, 2)

    run_virtual(main())


def test_adopted_interface_was_not_made() -> None:
    async def main() -> None:
        kernel, made = FakeKernel(), []
        await Converger(kernel, make_node(peer(2)), settings_of, Health(), unix_time).converge()
        converger = Converger(kernel, make_node(peer(2)), settings_of, Health(), unix_time)
        converger.on_created = lambda: made.append(True)
        await converger.converge()
        assert (converger.up.is_set(), made) == (True, [])

    run_virtual(main())


def test_mesh_is_not_up_while_the_link_is_somebody_elses_or_the_key_is_lost() -> None:
    async def main() -> None:
        kernel, node = FakeKernel(), make_node(peer(2))
        converger = Converger(kernel, node, settings_of, Health(), unix_time)
        await converger.converge()
        kernel.delete_link()
        kernel.make_link(Backend.KERNEL, alias="somebody's")
        await converger.converge()
        assert not converger.up.is_set()
        kernel.delete_link()
        await converger.converge()
        assert converger.up.is_set()
        node.rotate(make_identity(private_key=None))
        await converger.converge()
        assert not converger.up.is_set()

    run_virtual(main())


def test_link_that_was_made_and_got_no_port_is_no_mesh_in_the_heartbeat() -> None:
    async def main() -> None:
        kernel = FakeKernel()
        converger = Converger(kernel, make_node(peer(2)), settings_of, Health(), unix_time)
        kernel.make_link(Backend.KERNEL)  # by a pass that got no further
        assert await converger.status() is None
        await converger.converge()
        status = await converger.status()
        assert status is not None
        assert status.listen_port == kernel.listen_port != 0

    run_virtual(main())
