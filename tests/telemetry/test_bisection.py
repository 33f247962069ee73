"""Batches that are refused: what is sent next, and what becomes of each entry."""

from collections.abc import Callable, Sequence

import pytest

from plexd.telemetry.bisection import DIVISION_REQUESTS, SMALLEST_LIMIT, Bisection, EntryOutcome, Settled
from plexd.telemetry.window import Entry, batch_size

Judge = Callable[[Sequence[int]], str]
UNLIMITED = 1 << 40


class Origin:
    name = "test"

    def settle(self, position: object) -> None: ...


def batch(count: int, size: int = 10) -> list[Entry]:
    return [Entry(b"x" * size, Origin(), number, 0.0) for number in range(count)]


def cannot_shorten(entry: Entry) -> bool:
    return False


def run(trial: Bisection, judge: Callable[[list[Entry]], str]) -> tuple[list[Settled], int]:
    """What was settled in order, and how many requests that took. `judge` says accepted, refused or too_large."""
    settled: list[Settled] = []
    requests = 0
    while not trial.is_over:
        verdict = judge(trial.next())
        requests += 1
        settled += getattr(trial, verdict)()
    return settled, requests


def refusing(*poison: int) -> Callable[[list[Entry]], str]:
    return lambda part: "refused" if any(entry.position in poison for entry in part) else "accepted"


def fates(settled: list[Settled], fate: EntryOutcome) -> list[int]:
    return [entry.position for entry, what in settled if what is fate]


@pytest.mark.parametrize("culprit", [0, 1, 250, 498, 499])
def test_one_poison_entry_in_500_is_found_and_the_rest_delivered(culprit: int) -> None:
    settled, requests = run(Bisection(batch(500), UNLIMITED, cannot_shorten), refusing(culprit))
    assert fates(settled, EntryOutcome.REJECTED) == [culprit]
    assert len(fates(settled, EntryOutcome.SENT)) == 499
    assert requests <= DIVISION_REQUESTS


@pytest.mark.parametrize("poison", [(), (0,), (3,), (0, 1, 2), (2, 7), (7,), tuple(range(7))])
def test_entries_are_settled_in_order_each_once(poison: tuple[int, ...]) -> None:
    settled, _ = run(Bisection(batch(8), UNLIMITED, cannot_shorten), refusing(*poison))
    assert [entry.position for entry, _ in settled] == list(range(8))
    assert fates(settled, EntryOutcome.REJECTED) == list(poison)


def test_batch_of_which_nothing_is_accepted_is_quarantined() -> None:
    settled, _ = run(Bisection(batch(8), UNLIMITED, cannot_shorten), lambda part: "refused")
    assert fates(settled, EntryOutcome.QUARANTINED) == list(range(8))


def test_refused_batch_of_one_is_rejected() -> None:
    settled, requests = run(Bisection(batch(1), UNLIMITED, cannot_shorten), lambda part: "refused")
    assert (fates(settled, EntryOutcome.REJECTED), requests) == ([0], 1)


def test_requests_are_limited_and_the_rest_is_quarantined() -> None:
    poison = tuple(range(0, 500, 50))
    settled, requests = run(Bisection(batch(500), UNLIMITED, cannot_shorten), refusing(*poison))
    assert requests == DIVISION_REQUESTS
    assert [entry.position for entry, _ in settled] == list(range(500))
    quarantined = fates(settled, EntryOutcome.QUARANTINED)
    assert quarantined
    assert quarantined == list(range(quarantined[0], 500))


def at_most(limit: int) -> Callable[[list[Entry]], str]:
    return lambda part: "accepted" if batch_size(part) <= limit else "too_large"


def test_too_large_a_batch_arrives_in_halves_in_order() -> None:
    trial = Bisection(batch(1000, 1000), UNLIMITED, cannot_shorten)
    settled, _ = run(trial, at_most(200 << 10))
    assert fates(settled, EntryOutcome.SENT) == list(range(1000))
    assert SMALLEST_LIMIT <= trial.byte_limit <= 200 << 10


def test_known_limit_costs_no_refused_request() -> None:
    verdicts: list[str] = []

    def judge(part: list[Entry]) -> str:
        verdicts.append(at_most(200 << 10)(part))
        return verdicts[-1]

    run(Bisection(batch(1000, 1000), 150 << 10, cannot_shorten), judge)
    assert set(verdicts) == {"accepted"}


def test_limit_has_a_floor() -> None:
    trial = Bisection(batch(64, 1000), UNLIMITED, cannot_shorten)
    run(trial, at_most(3000))
    assert trial.byte_limit == SMALLEST_LIMIT


def shorten_to_10(entry: Entry) -> bool:
    entry.body = b"x" * 10
    return True


def test_single_entry_too_large_is_shortened_once() -> None:
    entries = batch(3)
    entries[1].body = b"x" * 500
    settled, _ = run(Bisection(entries, UNLIMITED, shorten_to_10), at_most(100))
    assert fates(settled, EntryOutcome.SENT) == [0, 1, 2]
    assert len(entries[1].body) == 10


@pytest.mark.parametrize("shorten", [cannot_shorten, shorten_to_10])
def test_single_entry_that_stays_too_large_is_dropped(shorten: Callable[[Entry], bool]) -> None:
    settled, _ = run(
        Bisection(batch(3), UNLIMITED, shorten),
        lambda part: "too_large" if any(entry.position == 0 for entry in part) else "accepted",
    )
    assert fates(settled, EntryOutcome.OVERSIZE) == [0]
    assert fates(settled, EntryOutcome.SENT) == [1, 2]


def test_abandoned_trial_gives_everything_back_in_order() -> None:
    trial = Bisection(batch(4), UNLIMITED, cannot_shorten)
    for _ in range(3):
        trial.next()
        trial.refused()
    assert [entry.position for entry in trial.abandon()] == [0, 1, 2, 3]
    assert trial.is_over
