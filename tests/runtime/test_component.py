"""What components give to the tables of the composition."""

from __future__ import annotations

import pytest

from plexd.runtime.component import contribute


def test_key_that_another_component_gave_is_refused_and_the_table_stays() -> None:
    table = {"heartbeat": 1, "logs": 2}
    with pytest.raises(ValueError, match="given twice: heartbeat, logs"):
        contribute(table, {"audit": 3, "heartbeat": 4, "logs": 5})
    assert table == {"heartbeat": 1, "logs": 2}


def test_entries_of_several_components_stand_side_by_side() -> None:
    table = {"heartbeat": 1}
    contribute(table, {"audit": 3})
    contribute(table, {})
    assert table == {"heartbeat": 1, "audit": 3}
