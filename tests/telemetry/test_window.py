"""Bounds, and when a batch is due."""

import pytest

from plexd.telemetry.window import Entry, Limits, Window, batch_size

LIMITS = Limits(batch_entries=3, batch_bytes=100, batch_seconds=10.0, entries=6, bytes=200)


class Origin:
    name = "test"

    def settle(self, position: object) -> None: ...


def entry(size: int = 10, entered: float = 0.0) -> Entry:
    return Entry(b"x" * size, Origin(), None, entered)


def filled(*sizes: int) -> Window:
    window = Window(LIMITS)
    for at, size in enumerate(sizes):
        window.add(entry(size, float(at)))
    return window


def test_batch_is_due_a_batch_interval_after_its_oldest_entry() -> None:
    assert filled().due_at() is None
    assert filled(10, 10).due_at() == 10.0


@pytest.mark.parametrize("sizes", [(10, 10, 10), (50, 60)], ids=["entries", "bytes"])
def test_full_batch_is_due_at_once(sizes: tuple[int, ...]) -> None:
    window = filled(*sizes)
    assert window.holds_a_batch
    assert window.due_at() == float("-inf")


def test_batch_has_no_more_than_its_entries_and_bytes() -> None:
    window = filled(10, 10, 10, 10)
    assert len(window.cut(1000)) == 3
    window = filled(40, 40, 40)
    batch = window.cut(1000)
    assert len(batch) == 2
    assert batch_size(batch) <= 100
    assert len(filled(30, 30, 30).cut(70)) == 2  # the endpoint takes less than the configuration allows


def test_single_entry_above_the_limit_is_a_batch() -> None:
    assert len(filled(150, 10).cut(100)) == 1


def test_entry_keeps_its_room_until_it_is_settled() -> None:
    window = filled(10, 10, 10, 10, 10, 10)
    batch = window.cut(1000)
    assert not window.fits(1)
    window.settle(batch[:1])
    assert window.fits(1)
    assert (window.count, window.bytes) == (5, 50)


def test_window_is_bounded_by_bytes_too() -> None:
    window = filled(100, 90)
    assert window.fits(10)
    assert not window.fits(11)


def test_entry_larger_than_the_window_may_enter_when_it_is_empty() -> None:
    assert filled().fits(500)
    assert not filled(1).fits(500)


def test_oldest_gives_way_but_not_what_is_in_flight() -> None:
    window = filled(10, 20, 30, 40, 50)
    batch = window.cut(10_000)
    gone = window.make_room(140)
    assert [len(e.body) for e in gone] == [40, 50]
    assert [len(e.body) for e in batch] == [10, 20, 30]
    assert window.count == 3
    assert window.make_room(1000) == []


def test_oldest_unsettled_entry_is_the_first_in_flight() -> None:
    window = filled(10, 10, 10, 10)
    batch = window.cut(1000)
    assert window.oldest() == 0.0
    window.settle(batch)
    assert window.oldest() == 3.0
    window.clear()
    assert window.oldest() is None
    assert (window.count, window.bytes) == (0, 0)
