"""What a pass and its changes came to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from plexd.log import get_logger
from plexd.mesh.changes import Outcome
from plexd.mesh.drift import Correction

log = get_logger("mesh")

ERRORS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class PassResult:
    """`changed` and `failed` count changes; `corrections` are what a drift report would hold.

    `due` is when a flapping object, or a resource that failed, may be repaired again, in the loop's time.
    """

    changed: int
    failed: int
    corrections: tuple[Correction, ...]
    due: float | None = None


def combined(results: Iterable[PassResult]) -> PassResult:
    """The result of a pass over several resources."""
    results = tuple(results)
    return PassResult(
        sum(result.changed for result in results),
        sum(result.failed for result in results),
        tuple(correction for result in results for correction in result.corrections),
        min((result.due for result in results if result.due is not None), default=None),
    )


def log_failures(outcomes: Sequence[Outcome]) -> int:
    """Log one line for each cause of failure; the number of changes that failed."""
    failures = [outcome for outcome in outcomes if outcome.error is not None]
    for error, count in Counter(outcome.error for outcome in failures).most_common(ERRORS_SHOWN):
        first = next(outcome.change for outcome in failures if outcome.error == error)
        log.error("change failed", change=type(first).__name__, error=error, count=count)
    return len(failures)


def first_error(outcomes: Sequence[Outcome]) -> str:
    """One sentence about all failures, empty without any."""
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    return f"{len(errors)} changes, first: {errors[0]}" if errors else ""
