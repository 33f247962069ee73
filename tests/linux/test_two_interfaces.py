"""Two interfaces and two tables of one agent are kept right beside each other, with wireguard-go."""

from __future__ import annotations

import pytest

from tests.two_interfaces import Names
from tests.two_interfaces_scene import play

pytestmark = pytest.mark.namespaces


def test_two_interfaces_and_two_tables_survive_damage_kills_and_each_other(namespace: str, interface: str) -> None:
    play(Names(interface), "userspace")
