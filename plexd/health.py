"""What can be wrong with the node, declared once. Status, readiness and heartbeat all read from here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from plexd.log import get_logger

log = get_logger("health")


class Condition(StrEnum):
    """The codes of the lifecycle contract, section 4; the value is what the control plane and operators see."""

    STREAM_DOWN = "stream_down"
    STATE_STALE = "state_stale"
    CHANGES_FAILED = "changes_failed"
    MESH_DOWN = "mesh_down"
    SUBSYSTEM_STOPPED = "subsystem_stopped"
    IDENTITY_REFUSED = "identity_refused"
    CLOCK_SKEW = "clock_skew"
    REPAIR_CONTESTED = "repair_contested"


TEXTS = {
    Condition.STREAM_DOWN: "the event stream has been down for five minutes; state is polled instead",
    Condition.STATE_STALE: "no state could be fetched for three reconcile intervals; the last known one is in force",
    Condition.CHANGES_FAILED: "the last pass could not make every change; it is repeated",
    Condition.MESH_DOWN: "the mesh interface is missing",
    Condition.SUBSYSTEM_STOPPED: "a service keeps failing",
    Condition.IDENTITY_REFUSED: "the control plane refuses this node's key; the mesh stays up, deliveries wait",
    Condition.CLOCK_SKEW: "this clock differs from the control plane's: check time synchronisation",
    Condition.REPAIR_CONTESTED: "another program keeps undoing repairs: make it leave the mesh interface alone",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A condition that holds. `since` is in Unix seconds; `detail` never holds a secret."""

    condition: Condition
    detail: str
    since: float


class Health:
    """Which conditions hold now."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._findings: dict[Condition, Finding] = {}
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
            self._findings[condition] = Finding(condition, detail, known.since)
            return
        else:
            self._findings[condition] = Finding(condition, detail, self._now())
            log.error("condition raised", condition=condition.value, detail=detail, meaning=TEXTS[condition])
        for listener in self.on_change:
            listener()

    def findings(self) -> tuple[Finding, ...]:
        return tuple(self._findings.values())
