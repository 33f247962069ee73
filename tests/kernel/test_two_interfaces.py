"""Two interfaces and two tables of one agent are kept right beside each other, with the kernel's WireGuard."""

from __future__ import annotations

from tests.two_interfaces import Names
from tests.two_interfaces_scene import play


def test_two_interfaces_and_two_tables_survive_damage_kills_and_each_other(namespace: str) -> None:
    play(Names("plexd0"), "kernel")
