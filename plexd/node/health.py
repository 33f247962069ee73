"""What can be wrong with the node, declared once. Status, readiness and heartbeat all read from here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

from plexd.log import get_logger

log = get_logger("health")


class Condition(StrEnum):
    """The codes of docs/contract/lifecycle.md §4; the value is what the control plane and operators see."""

    STREAM_DOWN = "stream_down"
    STATE_STALE = "state_stale"
    CHANGES_FAILED = "changes_failed"
    MESH_DOWN = "mesh_down"
    SUBSYSTEM_STOPPED = "subsystem_stopped"
    IDENTITY_REFUSED = "identity_refused"
    CLOCK_SKEW = "clock_skew"
    REPAIR_CONTESTED = "repair_contested"


class ConditionProblem(NamedTuple):
    """`severity` is "error" while the node cannot do its work, "warning" while it can; `remedy` is what to do."""

    severity: Literal["error", "warning"]
    text: str
    remedy: str


CONDITION_PROBLEMS = {
    Condition.STREAM_DOWN: ConditionProblem(
        "warning",
        "the event stream has been down for five minutes; state is polled instead",
        "check the way to the control plane; the log says what each attempt met",
    ),
    Condition.STATE_STALE: ConditionProblem(
        "warning",
        "no state could be fetched for three reconcile intervals; the last known one is in force",
        "check the way to the control plane; the mesh goes on meanwhile",
    ),
    Condition.CHANGES_FAILED: ConditionProblem(
        "warning",
        "the last pass could not make every change; it is repeated",
        "see the log for what the kernel refused",
    ),
    Condition.MESH_DOWN: ConditionProblem(
        "error",
        "there is no mesh interface, none that can have the mesh address, or no firewall for it",
        "the detail says what is in the way; it is tried again",
    ),
    Condition.SUBSYSTEM_STOPPED: ConditionProblem(
        "error",
        "a service keeps failing",
        "see the log for its error; a restart of plexd tries again",
    ),
    Condition.IDENTITY_REFUSED: ConditionProblem(
        "error",
        "the control plane refuses this node's key; the mesh stays up, deliveries wait",
        "ask the control plane about this node; with a new bootstrap token in its place plexd registers anew",
    ),
    Condition.CLOCK_SKEW: ConditionProblem(
        "warning",
        "this clock differs from the control plane's",
        "check time synchronisation here and there",
    ),
    Condition.REPAIR_CONTESTED: ConditionProblem(
        "warning",
        "another program keeps undoing repairs",
        "make it leave the mesh interface alone; repairs thin out meanwhile",
    ),
}


@dataclass(frozen=True, slots=True)
class RaisedCondition:
    """A condition that holds. `since` is in Unix seconds; `detail` never holds a secret."""

    condition: Condition
    detail: str
    since: float


class Health:
    """Which conditions hold now."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._findings: dict[Condition, RaisedCondition] = {}
        self.on_change: list[Callable[[], None]] = []

    def set(self, condition: Condition, holds: bool, detail: str = "") -> None:
        """Say whether a condition holds; saying the same again changes at most the detail."""
        known = self._findings.get(condition)
        if not holds:
            if known is None:
                return
            del self._findings[condition]
            log.info("condition cleared", condition=condition.value)
        elif known is not None:
            self._findings[condition] = RaisedCondition(condition, detail, known.since)
            return
        else:
            self._findings[condition] = RaisedCondition(condition, detail, self._now())
            meaning = CONDITION_PROBLEMS[condition].text
            log.error("condition raised", condition=condition.value, detail=detail, meaning=meaning)
        for listener in self.on_change:
            listener()

    def findings(self) -> tuple[RaisedCondition, ...]:
        return tuple(self._findings.values())
