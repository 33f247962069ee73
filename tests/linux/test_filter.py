"""The filter in a real kernel: what passes, what is counted, and that nothing from outside can change its text."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plexd.linux.nftables import Nftables
from plexd.mesh import firewall
from plexd.mesh.desired import Policy, PolicyRule
from plexd.mesh.firewall import TABLE
from plexd.mesh.nft_commands import Json
from plexd.mesh.policy import Protocol, resolve
from plexd.mesh.temporary_allows import TemporaryAllow, TemporaryAllows
from tests.linux.crossings import cross
from tests.linux.wires import MESH, Wires, run
from tests.mesh.policies import LOCAL, PEERS
from tests.mesh.rendering import render

pytestmark = pytest.mark.namespaces


@pytest.fixture
def wires(make_namespace: Callable[[], str]) -> Iterator[Wires]:
    wires = Wires(make_namespace)
    yield wires
    wires.close()


@pytest.mark.parametrize("seed", range(20))
def test_kernel_decides_and_counts_as_the_reference_does(wires: Wires, seed: int) -> None:
    cross(wires, seed)


# text from outside

FRAGMENTS = (
    '"', "'", "\\", "\n", "\r", "\0", "{", "}", ";", "#", "@", "*", "$(reboot)", '" accept comment "', "\u2028",
    "\ud7ff", '"}}},{"flush":{"ruleset":null}},', "\n} table inet x {", "-f /etc/passwd", "é", "x" * 10_000,
)  # fmt: skip
hostile = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join))


def hostile_rules(policy_id: str, text: str, node_id: str, action: str) -> tuple[Policy, ...]:
    """Rules that mean the same whatever the texts are, as long as `action` is no action."""
    lines = [PolicyRule(node_id, "n_a", port, "tcp", "allow") for port in range(1, 6)]  # a set
    lines += [PolicyRule(node_id, "n_a", 0, "icmp", "allow"), PolicyRule("n_a", node_id, 0, "", action)]
    lines += [PolicyRule(f"/{text}", "n_a", 0, "", "allow"), PolicyRule("n_a", f"{text}/", 0, "", "allow")]
    lines += [PolicyRule(node_id, "n_a", 0, f"?{text}", "allow")]
    return (Policy(policy_id, tuple(lines)),)


@pytest.mark.usefixtures("namespace")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy_id=hostile, name=hostile, text=hostile, node_id=hostile, action=hostile)
def test_text_from_outside_stands_in_comments_and_changes_nothing_else(
    policy_id: str, name: str, text: str, node_id: str, action: str
) -> None:
    def document(policy_id: str, name: str, text: str, node_id: str, action: str) -> Json:
        peers = {node_id: PEERS["n_b"]}
        rules = resolve(hostile_rules(policy_id, text, node_id, action), LOCAL, peers).rules
        temporary_allows = TemporaryAllows().open(TemporaryAllow(name, Protocol.UDP, 53, LOCAL.mesh_ip))
        settings_ = firewall.Settings(LOCAL.mesh_ip, (MESH,))
        return render(settings_, rules, visible=[PEERS["n_b"].mesh_ip], temporary_allows=temporary_allows)

    async def listed(document: Json) -> str:
        door = Nftables(TABLE)
        try:
            await door.apply(document)
        finally:
            await door.close()
        return run("nft", "-s", "list", "ruleset")

    harmless = asyncio.run(listed(document("pol", "name", "text", "node", "act")))
    # a node id is what is no address and not empty
    told = asyncio.run(listed(document(policy_id, name, text, f"n {node_id}".replace("/", ""), f"?{action}")))
    comments = re.compile(r' comment "([^"]*)"')
    assert comments.sub("", told) == comments.sub("", harmless)
    assert len(comments.findall(harmless)) >= 8
    assert all(re.fullmatch(r"[A-Za-z0-9_.:#-]{0,100}", comment) for comment in comments.findall(told))
