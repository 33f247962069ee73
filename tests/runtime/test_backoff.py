"""Delays are what the tables of the contract say, with the chances taken out."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.errors import ControlError, RateLimited, Transient, Unauthenticated
from plexd.runtime.backoff import Backoff, FullJitter, Postponement, Uniform, requested_delay


def lowest(low: float, high: float) -> float:
    return low


def highest(low: float, high: float) -> float:
    return high


def middle(low: float, high: float) -> float:
    return (low + high) / 2


@pytest.mark.parametrize(
    ("uniform", "expected"),
    [
        (middle, [1, 2, 4, 8, 16, 32, 60, 60]),
        (lowest, [0.75, 1.5, 3, 6, 12, 24, 45, 45]),
        (highest, [1.25, 2.5, 5, 10, 20, 40, 75, 75]),
    ],
)
def test_delay_doubles_up_to_the_cap_and_is_spread_by_a_quarter(uniform: Uniform, expected: list[float]) -> None:
    backoff = Backoff(1.0, 60.0, uniform)
    assert [backoff.next() for _ in expected] == expected


def test_first_delay_comes_again_after_a_reset() -> None:
    backoff = Backoff(5.0, 60.0, middle)
    assert [backoff.next(), backoff.next()] == [5, 10]
    backoff.reset()
    assert backoff.next() == 5


def test_looking_at_the_next_delay_does_not_use_it_up() -> None:
    backoff = Backoff(5.0, 60.0, highest)
    assert (backoff.peek(), backoff.peek(), backoff.next(), backoff.peek()) == (5, 5, 6.25, 10)


def test_base_above_the_cap_is_capped() -> None:
    assert Backoff(90.0, 60.0, middle).next() == 60


@pytest.mark.parametrize(
    ("uniform", "expected"),
    [
        (highest, [2, 4, 8, 16, 32, 60, 60]),
        (middle, [1, 2, 4, 8, 16, 30, 30]),
        (lowest, [0.05] * 7),
    ],
)
def test_reconnection_is_random_from_nothing_to_a_doubling_limit(uniform: Uniform, expected: list[float]) -> None:
    jitter = FullJitter(1.0, 60.0, uniform)
    assert [jitter.next() for _ in expected] == expected


def test_server_may_change_the_base_of_reconnection() -> None:
    jitter = FullJitter(1.0, 60.0, highest)
    jitter.next()
    jitter.base = 0.1
    assert jitter.next() == pytest.approx(0.4)
    jitter.reset()
    assert jitter.next() == pytest.approx(0.2)


@given(st.integers(0, 200), st.integers())
def test_delays_stay_within_bounds_for_ever(failures: int, seed: int) -> None:
    uniform = random.Random(seed).uniform
    backoff, jitter = Backoff(1.0, 60.0, uniform), FullJitter(1.0, 60.0, uniform)
    for _ in range(failures):
        assert 0.75 <= backoff.next() <= 75
        assert 0.05 <= jitter.next() <= 60


def test_a_fleet_does_not_come_back_in_one_burst() -> None:
    """1000 nodes that lost the stream together: no tenth of the first window sees more than 15 % of them."""
    chance = random.Random(7)
    delays = [FullJitter(1.0, 60.0, chance.uniform).next() for _ in range(1000)]
    assert max(sum(low <= delay < low + 0.2 for delay in delays) for low in (n / 5 for n in range(10))) < 150


@pytest.mark.parametrize(("uniform", "delay"), [(lowest, 40), (middle, 45), (highest, 50)])
def test_requested_delay_is_never_shorter_and_up_to_a_quarter_longer(uniform: Uniform, delay: float) -> None:
    assert requested_delay(RateLimited("429", status=429, retry_after=40.0), uniform) == delay


@pytest.mark.parametrize("error", [Transient("503", status=503), Unauthenticated("401", status=401)])
def test_errors_without_a_request_to_wait_have_no_delay(error: ControlError) -> None:
    assert requested_delay(error, highest) == 0.0


def test_postponement_ends_with_its_time() -> None:
    postponement = Postponement(lambda: "n_1", lowest)
    assert postponement.remaining(5.0) == 0.0
    postponement.postpone(RateLimited("429", status=429, retry_after=40.0), "n_1", 10.0)
    assert [postponement.remaining(now) for now in (10.0, 49.0, 50.0, 60.0)] == [40.0, 1.0, 0.0, 0.0]


def test_postponement_of_the_former_node_does_not_hold_for_the_new_one() -> None:
    node_id = "n_1"
    postponement = Postponement(lambda: node_id, lowest)
    limited = RateLimited("429", status=429, retry_after=40.0)
    postponement.postpone(limited, "n_1", 10.0)
    node_id = "n_2"
    assert postponement.remaining(11.0) == 0.0
    postponement.postpone(limited, "n_1", 12.0)  # the answer to a request that the former node had sent
    assert postponement.remaining(13.0) == 0.0
    postponement.postpone(limited, "n_2", 14.0)
    assert postponement.remaining(14.0) == 40.0
