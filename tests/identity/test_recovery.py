"""What a 401 leads to: a passing fault, probes for as long as a refusal stands, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from plexd.errors import RateLimited
from tests.node.heartbeats import GONE, REFUSED, UNKNOWN, Beats, Hints, beats, gaps
from tests.node_harness import FOREVER, highest, lowest, make_node, middle
from tests.virtual_time import run_virtual

pytestmark = pytest.mark.virtual_time


def test_one_401_is_confirmed_by_a_heartbeat_after_5_seconds() -> None:
    watched = beats(50, lambda n: REFUSED if n == 1 else Hints())
    assert watched.times == [0, 5, 35]
    assert not watched.is_refused
    assert not watched.node.suspected.is_set()


def test_passing_fault_is_a_warning() -> None:
    with capture_logs() as lines:
        beats(20, lambda n: REFUSED if n == 1 else Hints())
    assert [line["log_level"] for line in lines if line["event"] == "identity confirmed after a refusal"] == ["warning"]


async def test_401_to_another_call_cuts_the_wait_short() -> None:
    watched = Beats()
    await watched.run(50, (7.0, watched.suspect), (8.0, watched.suspect), (9.0, watched.suspect))
    assert watched.times == [0, 12, 42]
    assert not watched.is_refused


async def test_401_to_an_older_credential_means_nothing() -> None:
    watched = Beats()
    older = make_node(identity=replace(watched.node.identity, node_key=type(watched.node.credential())("older")))
    await watched.run(50, (7.0, lambda: watched.node.suspect(older.credential())))
    assert watched.times == [0, 30]


@pytest.mark.parametrize("uniform", [lowest, middle, highest])
def test_confirmation_waits_5_seconds_spread_by_a_quarter(uniform: Callable[[float, float], float]) -> None:
    watched = beats(20, lambda n: REFUSED if n == 1 else Hints(), uniform=uniform)
    assert watched.times[1] == pytest.approx(uniform(3.75, 6.25))


async def test_confirmation_waits_for_a_heartbeat_that_hangs() -> None:
    """Two at a time are never under way, and its answer is as good as another's."""
    watched = Beats(takes=20.0)
    await watched.run(70, (2.0, watched.suspect))
    assert watched.times == [0, 30, 60]
    assert not watched.is_refused


def test_confirmed_refusal_is_probed_after_1_2_4_and_then_every_5_minutes() -> None:
    watched = beats(3000, lambda _: REFUSED)
    assert watched.is_refused
    assert not watched.node.accepted.is_set()
    assert gaps(watched.times)[:7] == [5, 60, 120, 240, 300, 300, 300]


def test_refusal_is_one_error_line() -> None:
    with capture_logs() as lines:
        beats(3000, lambda _: REFUSED)
    assert sum(line["event"] == "identity refused" for line in lines) == 1


def test_accepted_probe_ends_the_refusal() -> None:
    watched = beats(500, lambda n: REFUSED if n <= 4 else Hints())
    assert not watched.is_refused
    assert watched.node.accepted.is_set()
    assert watched.times == [0, 5, 65, 185, 425, 455, 485]


def test_next_refusal_is_probed_from_the_beginning() -> None:
    watched = beats(2000, lambda n: REFUSED if n <= 5 or n >= 8 else Hints())
    assert gaps(watched.times)[:11] == [5, 60, 120, 240, 300, 30, 30, 5, 60, 120, 240]


def test_refused_identity_that_cannot_be_reached_is_probed_at_the_same_pace() -> None:
    watched = beats(500, lambda n: REFUSED if n <= 2 else GONE)
    assert gaps(watched.times) == [5, 60, 120, 240]
    assert watched.is_refused


def test_suspicion_that_nobody_can_confirm_keeps_the_ordinary_pace() -> None:
    """A 401, and then a control plane that is gone: no heartbeat every five seconds."""
    watched = beats(200, lambda n: REFUSED if n == 1 else GONE)
    assert gaps(watched.times) == [5, 30, 30, 30, 30, 30, 30]
    assert not watched.is_refused


def test_retry_after_holds_while_a_suspicion_is_confirmed() -> None:
    limited = RateLimited("503", status=503, retry_after=120.0)
    watched = beats(200, lambda n: {1: REFUSED, 2: limited}.get(n, Hints()), uniform=lowest)
    assert watched.times[2] - watched.times[1] >= 120


def test_three_404s_in_a_row_count_as_a_401() -> None:
    watched = beats(300, lambda _: UNKNOWN)
    assert watched.is_refused
    assert gaps(watched.times)[:5] == [30, 30, 5, 60, 120]


# --- another identity


def watch(
    seconds: float,
    script: Callable[[int], Hints | Exception],
    *,
    on_disk_at: float = FOREVER,
    token_at: float = FOREVER,
) -> Beats:
    async def main() -> Beats:
        watched = Beats(script)
        watched.renewal.on_disk_at, watched.renewal.token_at = on_disk_at, token_at
        await watched.run(seconds)
        return watched

    return run_virtual(main())


def test_identity_is_looked_for_on_disk_before_a_heartbeat_confirms_the_refusal() -> None:
    watched = watch(50, lambda n: REFUSED if n == 1 else Hints(), on_disk_at=0)
    assert watched.renewal.adoptions == [0]
    assert watched.times == [0, 0, 30]  # the new one is alive at once, and nobody doubts it
    assert not watched.is_refused


def test_token_is_looked_for_only_when_the_refusal_is_confirmed() -> None:
    assert watch(50, lambda n: REFUSED if n == 1 else Hints(), token_at=0).renewal.registrations == []
    assert watch(50, lambda _: GONE).renewal.registrations == []


def test_token_ends_a_confirmed_refusal_at_once() -> None:
    watched = watch(50, lambda n: REFUSED if n <= 2 else Hints(), token_at=0)
    assert watched.renewal.registrations == [5]
    assert watched.times == [0, 5, 5, 35]
    assert not watched.is_refused
    assert watched.node.settled.is_set()


def test_both_are_looked_for_again_before_each_probe() -> None:
    watched = watch(1000, lambda _: REFUSED)
    assert watched.times == [0, 5, 65, 185, 425, 725]
    assert watched.renewal.registrations == [5, 65, 185, 425, 725]
    assert watched.renewal.adoptions == [0, 5, 65, 185, 425, 725]


@pytest.mark.parametrize("source", ["on_disk_at", "token_at"])
def test_identity_that_turns_up_ends_the_refusal_without_a_probe_of_the_old_one(source: str) -> None:
    watched = watch(300, lambda n: REFUSED if n <= 3 else Hints(), **{source: 70.0})
    assert watched.times[:4] == [0, 5, 65, 185]
    assert gaps(watched.times[3:]) == [30, 30, 30]
    assert watched.reconcile.calls == []


def test_new_identity_that_is_refused_too_is_recovered_like_the_first() -> None:
    watched = watch(300, lambda _: REFUSED, on_disk_at=0)
    assert watched.times == [0, 0, 5, 65, 185]
    assert watched.is_refused


def test_404s_of_the_old_identity_do_not_count_against_the_new_one() -> None:
    watched = watch(200, lambda n: UNKNOWN if n <= 5 else Hints(), token_at=0)
    # three, a fourth that confirms, and the new identity's own first, which proves nothing
    assert watched.times[:6] == [0, 30, 60, 65, 65, 95]
    assert not watched.is_refused


async def test_answer_to_the_old_identity_says_nothing_of_the_new_one() -> None:
    """A heartbeat under way is the one call that a change of the identity does not end."""
    watched = Beats(lambda n: Hints() if n == 1 else REFUSED, takes=10)
    await watched.run(30, (5, watched.renewal._renewed), (6, watched.suspect))
    assert watched.times == [0, 11]
    assert watched.is_refused


async def test_heartbeats_rest_while_another_identity_is_being_got() -> None:
    """Registering may take minutes; two heartbeats at a time are never under way."""
    watched = Beats(lambda n: REFUSED if n <= 2 else Hints())

    async def slowly() -> bool:
        await asyncio.sleep(200)
        return watched.renewal._renewed()

    watched.renewal.register = slowly  # type: ignore[method-assign]
    await watched.run(250)
    assert watched.times == [0, 5, 205, 235]


def test_failed_recovery_is_taken_up_again() -> None:
    """The supervisor starts it again; the refusal still stands."""

    async def main() -> Beats:
        watched = Beats(lambda _: REFUSED)
        recovery = asyncio.create_task(watched.recovery.run())
        watched.suspect()
        await asyncio.sleep(20)
        assert not watched.node.accepted.is_set()
        recovery.cancel()
        await asyncio.wait({recovery})
        watched.renewal.token_at = 25.0
        recovery = asyncio.create_task(watched.recovery.run())
        await asyncio.sleep(10)
        assert watched.node.accepted.is_set()
        recovery.cancel()
        return watched

    run_virtual(main())
