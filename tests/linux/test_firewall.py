"""The table `inet plexd` in the real kernel: replaced whole, known to be untouched, and told of when it is not."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plexd.converge.assembly import build_mesh
from plexd.converge.passes import Converger
from plexd.errors import FirewallUnavailable, KernelError, PolicyRejected
from plexd.linux import nftables
from plexd.linux.firewall import FirewallTable
from plexd.mesh.address import parse_ip
from plexd.mesh.changes import ReplaceTable
from plexd.mesh.firewall import TABLE, Ruleset, Settings, ruleset
from plexd.mesh.keys import PrivateKey
from plexd.mesh.target import Settings as MeshSettings
from plexd.node.health import Condition, Health
from plexd.store.identity import Identity
from tests.linux.tables import nft, play
from tests.mesh_kernel import MeshKernel
from tests.node_harness import enforcing, make_identity, make_node

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft"),
]

SETTINGS = Settings(parse_ip("10.100.0.1"), ("plexd0",))
BASELINE = ruleset(SETTINGS)
WITH_PEERS = ruleset(SETTINGS, visible=[parse_ip("10.100.0.2"), parse_ip("10.100.0.3")])
NEIGHBOUR = "add table ip neighbour; add chain ip neighbour in { type filter hook input priority 0; }"


def refused() -> Ruleset:
    """The baseline and, in the same transaction, a rule for a chain that is not there."""
    rule = {"family": "inet", "table": "plexd", "chain": "nowhere", "expr": [{"drop": None}]}
    return Ruleset.of([*BASELINE.frame, {"add": {"rule": rule}}], {}, 1, TABLE)


def test_table_is_what_was_put_there_until_somebody_touches_it(namespace: str) -> None:
    async def scene(table: FirewallTable) -> None:
        assert await table.observe() is None
        await table.replace(BASELINE)
        assert await table.observe() == BASELINE.digest
        await table.replace(WITH_PEERS)
        assert await table.observe() == WITH_PEERS.digest
        nft("add rule inet plexd mesh accept")
        assert await table.observe() == ""
        await table.replace(WITH_PEERS)
        assert await table.observe() == WITH_PEERS.digest
        nft("flush ruleset")
        assert await table.observe() is None

    play(scene)


@pytest.mark.parametrize(
    "damage",
    [
        "delete element inet plexd peers { 10.100.0.2 }",
        "flush chain inet plexd mesh",
        "flush chain inet plexd input",
        "insert rule inet plexd mesh accept",
        "add element inet plexd peers { 10.100.0.9 }",
        "add chain inet plexd other",
    ],
)
def test_every_kind_of_damage_shows(namespace: str, damage: str) -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(WITH_PEERS)
        await table.observe()
        nft(damage)
        assert await table.observe() == ""

    play(scene)


def test_other_tables_are_no_damage_and_untouched_tables_are_not_read_again(namespace: str) -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(WITH_PEERS)
        await table.observe()
        reads = table.reads
        assert await table.observe() == WITH_PEERS.digest
        assert table.reads == reads
        nft(NEIGHBOUR)
        assert await table.observe() == WITH_PEERS.digest
        assert table.reads == reads + 1

    play(scene)


def test_refused_transaction_changes_nothing(namespace: str) -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(WITH_PEERS)
        before = nft("-s", "list", "ruleset")
        with pytest.raises(PolicyRejected, match="No such file or directory"):
            await table.replace(refused())
        assert nft("-s", "list", "ruleset") == before
        assert await table.observe() == WITH_PEERS.digest

    play(scene)


def test_table_of_an_earlier_run_is_not_taken_for_ours(namespace: str) -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(BASELINE)
        later = FirewallTable(TABLE)
        assert await later.observe() == ""
        assert await later.remove()
        assert not await later.remove()
        assert await later.observe() is None
        await later.close()

    play(scene)


def test_neighbours_are_left_as_they_are(namespace: str) -> None:
    nft(NEIGHBOUR)
    before = nft("-s", "list", "table", "ip", "neighbour")

    async def scene(table: FirewallTable) -> None:
        await table.replace(WITH_PEERS)
        await table.replace(BASELINE)
        assert nft("-s", "list", "table", "ip", "neighbour") == before
        await table.remove()
        assert nft("-s", "list", "ruleset") == before

    play(scene)


def test_host_without_nft_is_told_what_to_install_when_something_is_to_be_put_there(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nftables, "SEARCH_PATH", "/nowhere")

    async def scene(table: FirewallTable) -> None:
        assert await table.observe() is None
        with pytest.raises(FirewallUnavailable, match="install the package nftables"):
            await table.replace(BASELINE)
        assert not await table.remove()

    play(scene)


# nft that cannot be had, while a table is in force


def refuse_to_start(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Nothing of the name nft can be started; other programs can."""
    real = subprocess.Popen

    def start(command: list[str], *args: Any, **options: Any) -> Any:
        if Path(command[0]).name == "nft":
            raise OSError(code, os.strerror(code))
        return real(command, *args, **options)

    monkeypatch.setattr(subprocess, "Popen", start)


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.EIO])
def test_table_is_not_called_missing_because_nft_could_not_be_started(
    namespace: str, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(WITH_PEERS)
        await table.observe()
        nft(NEIGHBOUR)
        writes = table.writes
        with monkeypatch.context() as patch:
            refuse_to_start(patch, code)
            with pytest.raises(KernelError, match=os.strerror(code)) as failed:
                await table.observe()
        assert type(failed.value) is KernelError
        assert "install" not in str(failed.value)
        assert await table.observe() == WITH_PEERS.digest
        assert table.writes == writes

    play(scene)


def test_table_that_there_is_no_program_to_list_is_not_known_and_stays_in_force(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_less = ruleset(SETTINGS, visible=[parse_ip("10.100.0.2")])

    async def scene(table: FirewallTable) -> None:
        await table.replace(WITH_PEERS)
        await table.observe()
        nft(NEIGHBOUR)
        before = nft("list", "ruleset")
        with monkeypatch.context() as patch:
            patch.setattr(nftables, "SEARCH_PATH", "/nowhere")
            assert await table.observe() == ""
            with pytest.raises(FirewallUnavailable, match="install the package nftables"):
                await table.replace(one_less)  # in a table that is known it takes no nft
        assert nft("list", "ruleset") == before
        assert await table.observe() == WITH_PEERS.digest

    play(scene)


@pytest.mark.parametrize("is_installed", [True, False])
async def test_mesh_stays_up_behind_its_table_while_nft_cannot_be_had(
    namespace: str, interface: str, monkeypatch: pytest.MonkeyPatch, is_installed: bool
) -> None:
    def settings(identity: Identity) -> MeshSettings | None:
        own = enforcing(identity)
        return own and replace(own, interface=interface, policy=Settings(identity.mesh_ip, (interface,)))

    def is_up() -> bool:
        shown = subprocess.run(["ip", "-o", "link", "show", "dev", interface], check=True, capture_output=True)
        return b",UP," in shown.stdout

    own_key = PrivateKey.generate()
    kernel, node, health = (
        MeshKernel(interface, "auto", "wireguard-go"),
        make_node(identity=make_identity(own_key)),
        Health(),
    )
    mesh = build_mesh(kernel.mesh, kernel.mesh_table, node, settings, health)
    converger = Converger([mesh.resource], health)
    try:
        assert (await converger.converge()).failed == 0
        assert is_up()
        await asyncio.to_thread(nft, NEIGHBOUR)
        before = nft("list", "ruleset")
        with monkeypatch.context() as patch:
            if is_installed:
                refuse_to_start(patch, errno.EAGAIN)
            else:
                patch.setattr(nftables, "SEARCH_PATH", "/nowhere")
            assert (await converger.converge()).failed == 1
        assert is_up()
        assert nft("list", "ruleset") == before
        assert [finding.condition for finding in health.findings()] == [Condition.CHANGES_FAILED]
        result = await converger.converge()
        assert (result.changed, result.failed, health.findings()) == (0, 0, ())
    finally:
        await kernel.tear_down(own_key.public())
        await kernel.close()


def test_kernel_without_nftables_has_no_table_and_says_what_to_load(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nftables, "NETLINK_NETFILTER", 99)

    async def scene(table: FirewallTable) -> None:
        assert await table.observe() is None
        with pytest.raises(FirewallUnavailable, match="load the module nf_tables"):
            await table.replace(BASELINE)
        assert not await table.remove()

    play(scene)


# notifications


async def is_noticed(table: FirewallTable, command: str) -> bool:
    """Whether this transaction of nft makes a look due."""
    noticed, turns = asyncio.Event(), 0
    watch = asyncio.create_task(table.watch(noticed))
    try:
        await noticed.wait()  # the one at the start
        noticed.clear()
        await asyncio.to_thread(nft, command)
        while turns < 50 and not noticed.is_set():  # all was sent before nft ended: it only has to be read
            turns += 1
            await asyncio.sleep(0.001)
        return noticed.is_set()
    finally:
        watch.cancel()
        await asyncio.wait({watch})


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("flush ruleset", True),
        ("add rule inet plexd mesh accept", True),
        ("delete element inet plexd peers { 10.100.0.2 }", True),
        ("delete table inet plexd", True),
        (NEIGHBOUR, False),
        ("add table inet plexd2", False),
        ("add table ip plexd", False),
    ],
)
def test_only_changes_of_our_table_are_told(namespace: str, command: str, expected: bool) -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(WITH_PEERS)
        await table.observe()
        assert await is_noticed(table, command) is expected

    play(scene)


async def test_flushed_ruleset_wakes_the_door(namespace: str, interface: str) -> None:
    kernel = MeshKernel(interface, "auto", "wireguard-go")
    (outcome,) = await kernel.apply([ReplaceTable(WITH_PEERS)])
    assert outcome.error is None
    watch = asyncio.create_task(kernel.watch_firewall())
    async with asyncio.timeout(10):
        await kernel.noticed.wait()
        assert await kernel.mesh_table.observe() == WITH_PEERS.digest
        kernel.noticed.clear()
        await asyncio.to_thread(nft, "flush ruleset")
        await kernel.noticed.wait()
        assert await kernel.mesh_table.observe() is None
    watch.cancel()
    await asyncio.wait({watch})
    await kernel.close()


async def test_tear_down_removes_the_table_also_without_an_interface(namespace: str, interface: str) -> None:
    kernel = MeshKernel(interface, "auto", "wireguard-go")
    await kernel.apply([ReplaceTable(WITH_PEERS)])
    assert await kernel.tear_down(None) == ["inet plexd"]
    assert await kernel.tear_down(None) == []
    assert nft("list", "ruleset") == ""
    await kernel.close()
