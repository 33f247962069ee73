"""A condition holds from when it was said to until it is said not to."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from plexd.node.health import CONDITION_PROBLEMS, Condition, Health, RaisedCondition


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_new_node_has_no_findings() -> None:
    assert Health().findings() == ()


def test_condition_is_found_since_it_was_raised() -> None:
    clock = Clock()
    health = Health(clock)
    health.set(Condition.MESH_DOWN, True, "no TUN")
    clock.now += 50
    health.set(Condition.MESH_DOWN, True, "no program")
    assert health.findings() == (RaisedCondition(Condition.MESH_DOWN, "no program", 1000.0),)


def test_cleared_condition_starts_anew_when_raised_again() -> None:
    clock = Clock()
    health = Health(clock)
    health.set(Condition.STREAM_DOWN, True)
    health.set(Condition.STREAM_DOWN, False)
    assert health.findings() == ()
    clock.now += 50
    health.set(Condition.STREAM_DOWN, True)
    assert health.findings() == (RaisedCondition(Condition.STREAM_DOWN, "", 1050.0),)


def test_conditions_hold_independently() -> None:
    health = Health()
    health.set(Condition.STREAM_DOWN, True)
    health.set(Condition.CLOCK_SKEW, True)
    health.set(Condition.STREAM_DOWN, False)
    assert [finding.condition for finding in health.findings()] == [Condition.CLOCK_SKEW]


def test_listeners_hear_of_changes_and_not_of_repetitions() -> None:
    health = Health()
    heard: list[int] = []
    health.on_change.append(lambda: heard.append(len(health.findings())))
    for holds in (False, True, True, False, False):
        health.set(Condition.MESH_DOWN, holds)
    assert heard == [1, 0]


def test_raising_is_an_error_that_explains_and_clearing_is_told() -> None:
    health = Health()
    with capture_logs() as records:
        health.set(Condition.STATE_STALE, True, "last fetched 200 s ago")
        health.set(Condition.STATE_STALE, True, "last fetched 260 s ago")
        health.set(Condition.STATE_STALE, False)
    assert [(record["log_level"], record["condition"]) for record in records] == [
        ("error", "state_stale"),
        ("info", "state_stale"),
    ]
    assert records[0]["meaning"] == CONDITION_PROBLEMS[Condition.STATE_STALE].text


@pytest.mark.parametrize("condition", Condition)
def test_every_condition_has_a_meaning_and_a_remedy(condition: Condition) -> None:
    meaning = CONDITION_PROBLEMS[condition]
    assert meaning.text
    assert meaning.remedy
