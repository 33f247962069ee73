"""The table amended by the elements that differ: what the kernel then holds is what a whole new table would be."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plexd.errors import KernelError
from plexd.linux.firewall import FirewallTable
from plexd.linux.nftables import Nftables
from plexd.mesh import firewall
from plexd.mesh.address import Prefix
from plexd.mesh.desired import Policy
from plexd.mesh.firewall import TABLE, Ruleset, SetChange, Settings, ruleset
from plexd.mesh.policy import Action, Local, Protocol, Rule, Side, resolve
from plexd.mesh.table_reading import fingerprint
from plexd.mesh.temporary_allows import NO_TEMPORARY_ALLOWS, TemporaryAllow, TemporaryAllows
from plexd.mesh.visibility import Visibility
from tests.linux.tables import nft, play
from tests.mesh import policies as mesh
from tests.mesh.policies import LOCAL, PEERS

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft"),
    pytest.mark.usefixtures("namespace"),
]

SETTINGS = Settings(LOCAL.mesh_ip, ("plexd0",))
OWN = Side(Prefix.host(LOCAL.mesh_ip), "n_a")
NEIGHBOUR = "add table ip neighbour"


def peers(*numbers: int) -> Ruleset:
    return ruleset(SETTINGS, visible=[bytes([10, 100, 1, number]) for number in numbers])


def ports(*numbers: int) -> Ruleset:
    return ruleset(
        SETTINGS, [Rule("pol", n, OWN, OWN, Protocol.TCP, port, Action.ALLOW) for n, port in enumerate(numbers)]
    )


async def whole(wanted: Ruleset) -> str | None:
    """The fingerprint of the table after it was loaded anew."""
    door = Nftables(TABLE)
    try:
        await door.apply(wanted.document())
        table = await door.read_table()
        assert table is not None
        return fingerprint(table)
    finally:
        await door.close()


async def replace(table: FirewallTable, wanted: Ruleset, *, amended: bool = True) -> None:
    """Put it there, by an amendment or not, which is seen by the handle of the table."""
    before = handle()
    await table.replace(wanted)
    assert (handle() == before) is amended


def handle() -> int:
    (table,) = (
        item["table"]
        for item in json.loads(nft("-j", "list", "tables"))["nftables"][1:]
        if item["table"]["name"] == "plexd"
    )
    return int(table["handle"])


# the property

openings_ = st.lists(st.integers(2000, 2006), max_size=6, unique=True).map(
    lambda numbers: TemporaryAllows(tuple(TemporaryAllow(f"o{n}", Protocol.TCP, n, LOCAL.mesh_ip) for n in numbers))
)
worlds = st.tuples(
    st.frozensets(st.sampled_from(sorted(PEERS)), min_size=2),
    st.one_of(st.just(NO_TEMPORARY_ALLOWS), openings_),
    st.booleans(),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mesh.all_policies,
    mesh.all_policies,
    mesh.locals_,
    st.lists(worlds, min_size=2, max_size=5),
    st.sampled_from((1, 3)),
)
def test_table_amended_is_the_table_loaded_anew(
    one: tuple[Policy, ...],
    other: tuple[Policy, ...],
    local: Local,
    steps: list[tuple[frozenset[str], TemporaryAllows, bool]],
    few: int,
) -> None:
    def wanted(here: frozenset[str], temporary_allows: TemporaryAllows, first: bool) -> Ruleset:
        known = {peer_id: PEERS[peer_id] for peer_id in sorted(here)}
        rules = resolve(one if first else other, local, known).rules
        visibility = Visibility(rules, local, Action.ALLOW)
        visible = visibility.among({each.id: each.allowed_ips for each in known.values()})
        settings_ = Settings(local.mesh_ip, ("plexd0",), Action.ALLOW)
        return ruleset(
            settings_, rules, visible=(PEERS[each].mesh_ip for each in visible), temporary_allows=temporary_allows
        )

    async def main() -> None:
        table = FirewallTable(TABLE)
        for step in steps:
            await table.replace(target := wanted(*step))
            assert await table.observe() == target.digest
        told = await table.read()
        assert told is not None
        assert fingerprint(told) == await whole(target)
        await table.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(firewall, "FEW", few)  # 1: whatever can becomes elements
        asyncio.run(main())


# what an amendment is and is not


def test_peer_that_comes_or_goes_amends_the_table_and_nothing_is_read() -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(peers(2, 3))
        assert await table.observe() == peers(2, 3).digest
        reads, writes = table.reads, table.writes
        for wanted in (peers(2, 3, 4), peers(2, 4), peers(4, 5)):
            await replace(table, wanted)
            assert await table.observe() == wanted.digest
        assert table.reads == reads
        assert table.writes == writes + 3
        assert "{ 10.100.1.4, 10.100.1.5 }" in nft("list", "set", "inet", "plexd", "peers")

    play(scene)


def test_amendment_keeps_what_was_counted() -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(ports(21, 22, 23, 24))
        await table.observe()
        name = next(iter(ports(21, 22, 23, 24).sets))
        nft(f"delete element inet plexd {name} {{ 10.100.1.1 . 10.100.1.1 . 22 }}")
        counted = 'counter packets 7 bytes 588 comment "pol#1"'
        nft(f"add element inet plexd {name} {{ 10.100.1.1 . 10.100.1.1 . 22 {counted} }}")
        assert await table.observe() == ports(21, 22, 23, 24).digest
        await replace(table, ports(21, 22, 23, 25))
        told = nft("list", "set", "inet", "plexd", name)
        assert 'packets 7 bytes 588 comment "pol#1"' in told
        assert ". 25 counter packets 0 bytes 0" in told

    play(scene)


def with_very_many() -> Ruleset:
    more = {bytes([10, 9, number >> 8, number & 255]): "" for number in range(firewall.AMENDED_AT_ONCE + 1)}
    return ruleset(SETTINGS, visible=[bytes([10, 100, 1, 2]), *more])


@pytest.mark.parametrize("after", [peers(), ports(21), with_very_many()])
def test_other_rules_or_very_many_elements_are_a_new_table(after: Ruleset) -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(peers(2))
        await replace(table, after, amended=False)
        assert await table.observe() == after.digest

    play(scene)


def test_amendment_of_a_table_that_was_not_read_back_yet_is_seen_by_the_next_look() -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(peers(2, 3))
        await replace(table, peers(2, 3, 4))
        reads = table.reads
        assert await table.observe() == peers(2, 3, 4).digest
        assert table.reads == reads + 1

    play(scene)


# what others do meanwhile


@pytest.mark.parametrize("change", [NEIGHBOUR, "add rule inet plexd mesh accept"])
def test_change_of_somebody_else_before_an_amendment_makes_a_look_due(change: str) -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(peers(2, 3))
        await table.observe()
        nft(change)
        await replace(table, peers(2, 3, 4))
        reads = table.reads
        seen = await table.observe()
        assert table.reads == reads + 1
        assert seen == (peers(2, 3, 4).digest if change == NEIGHBOUR else "")

    play(scene)


@pytest.mark.parametrize(
    "damage",
    [
        "add element inet plexd peers { 10.100.1.4 }",  # what is to be added is there
        "delete element inet plexd peers { 10.100.1.3 }",  # what is to go is gone
        "delete table inet plexd",
    ],
)
def test_table_that_is_not_what_it_was_thought_to_be_is_replaced_at_once(damage: str) -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(peers(2, 3))
        await table.observe()
        nft(damage)
        await table.replace(peers(2, 4))
        assert await table.observe() == peers(2, 4).digest
        assert fingerprint(json.loads(nft("-j", "-p", "list", "table", "inet", "plexd"))) == await whole(peers(2, 4))

    play(scene)


def test_damage_that_was_seen_is_repaired_with_the_whole_table() -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(peers(2, 3))
        await table.observe()
        nft("insert rule inet plexd mesh accept")
        assert await table.observe() == ""
        await replace(table, peers(2, 3, 4), amended=False)
        assert await table.observe() == peers(2, 3, 4).digest

    play(scene)


def test_own_amendment_wakes_nobody_and_the_next_change_of_another_does() -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(peers(2, 3))
        noticed = asyncio.Event()
        watch = asyncio.create_task(table.watch(noticed))
        await noticed.wait()
        await table.observe()
        noticed.clear()
        for number in range(4, 40):
            await replace(table, peers(2, 3, number))
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert not noticed.is_set()
        await asyncio.to_thread(nft, "add rule inet plexd mesh accept")
        await noticed.wait()
        assert await table.observe() == ""
        watch.cancel()
        await asyncio.wait({watch})

    play(scene)


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EPERM, errno.ENOBUFS])
def test_amendment_that_fails_otherwise_is_made_up_for_by_the_whole_table(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(peers(2, 3))
        await table.observe()

        async def refuse(*_: object) -> bool:
            raise KernelError(errno.errorcode[code])

        monkeypatch.setattr(table._nft, "amend", refuse)
        await replace(table, peers(2, 3, 4), amended=False)
        assert await table.observe() == peers(2, 3, 4).digest

    play(scene)


def test_batch_is_all_or_nothing_and_keeps_to_its_generation() -> None:
    async def scene(table: FirewallTable) -> None:
        await table.replace(peers(2, 3))
        door = Nftables(TABLE)
        three, four, five = (bytes([10, 100, 1, number]) for number in (3, 4, 5))
        before = nft("list", "ruleset")
        generation = door.generation()
        assert not await door.amend([SetChange("peers", (), {four: ""})], generation + 1)
        with pytest.raises(KernelError, match="No such file"):
            await door.amend([SetChange("peers", (five,), {four: ""})])
        with pytest.raises(KernelError, match="No such file"):
            await door.amend([SetChange("peers", (), {four: ""}), SetChange("nothing", (), {five: ""})])
        with pytest.raises(KernelError, match="File exists"):
            await door.amend([SetChange("peers", (), {four: ""}), SetChange("peers", (), {three: ""})])
        assert nft("list", "ruleset") == before
        assert door.generation() == generation
        assert await door.amend([SetChange("peers", (), {four: ""})], generation)
        assert door.generation() == generation + 1
        await door.close()

    play(scene)
