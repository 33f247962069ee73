"""Records become events, in order and in bounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from plexd.audit import types
from plexd.audit.grouping import MAX_OPEN_BYTES, MAX_OPEN_EVENTS, WAIT_SECONDS, Assembler, Event
from plexd.audit.records import EventId, Record
from tests.audit.captures import events, logged, multicast


def make(number: int, serial: int, body: str = "") -> Record:
    event = EventId(1000, serial)
    return Record(number, event, f"audit({event}): {body}", body)


def serials(found: list[Event]) -> list[int]:
    return [event.id.serial for event in found]


def test_an_event_ends_with_its_last_record() -> None:
    assembler = Assembler()
    assert assembler.add(make(types.SYSCALL, 1), 0.0) == []
    assert assembler.add(make(types.CWD, 1), 0.0) == []
    (event,) = assembler.add(make(types.EOE, 1), 0.1)
    assert [record.type for record in event.records] == [types.SYSCALL, types.CWD]
    assert assembler.due is None


def test_an_event_without_end_waits_two_seconds_from_its_first_record() -> None:
    assembler = Assembler()
    assembler.add(make(types.SYSCALL, 1), 10.0)
    assembler.add(make(types.CWD, 1), 11.9)
    assert assembler.due == 10.0 + WAIT_SECONDS
    assert assembler.expire(11.999) == []
    assert serials(assembler.expire(12.0)) == [1]


def test_what_programs_say_comes_out_at_once() -> None:
    for number in (types.USER, 1100, 1299, 2000, 2999):
        assert serials(Assembler().add(make(number, 7), 0.0)) == [7]


def test_events_come_out_in_the_order_of_their_first_records() -> None:
    assembler = Assembler()
    assembler.add(make(types.SYSCALL, 1), 0.0)
    assembler.add(make(types.SYSCALL, 2), 0.0)
    assert assembler.add(make(types.EOE, 2), 0.0) == []
    assert assembler.add(make(1100, 3), 0.0) == []
    assert serials(assembler.add(make(types.EOE, 1), 0.0)) == [1, 2, 3]


def test_two_events_of_one_millisecond_stay_two() -> None:
    assembler = Assembler()
    mixed = [make(types.SYSCALL, 1), make(types.SYSCALL, 2), make(types.CWD, 1), make(types.CWD, 2)]
    for record in mixed:
        assembler.add(record, 0.0)
    assert [len(event.records) for event in assembler.flush()] == [2, 2]


def test_the_end_of_an_event_that_came_out_already_is_no_event() -> None:
    assembler = Assembler()
    assert assembler.add(make(types.EOE, 1), 0.0) == []
    assert assembler.flush() == []


def test_too_many_open_events_push_the_oldest_out() -> None:
    assembler = Assembler()
    found = [event for serial in range(MAX_OPEN_EVENTS + 5) for event in assembler.add(make(1300, serial), 0.0)]
    assert serials(found) == [0, 1, 2, 3, 4]


def test_a_large_event_comes_out_in_parts() -> None:
    assembler = Assembler()
    piece = "a1[0]=" + "41" * 4000
    count = 3 * MAX_OPEN_BYTES // len(piece)
    found = [event for _ in range(count) for event in assembler.add(make(types.EXECVE, 1, piece), 0.0)]
    found += assembler.flush()
    assert sum(len(event.records) for event in found) == count
    assert len(found) >= 3


def test_real_events_are_whole() -> None:
    of_kernel, of_daemon = events(multicast()), events(logged())
    assert len(of_kernel) == 24
    assert of_kernel == of_daemon


@given(
    st.lists(
        st.tuples(
            st.integers(0, 6),
            st.sampled_from([types.SYSCALL, types.CWD, types.PATH, types.EOE, 1100, types.USER]),
            st.floats(0, 1.5),
        )
    )
)
def test_no_record_is_lost_doubled_or_kept_longer_than_two_seconds(steps: list[tuple[int, int, float]]) -> None:
    assembler = Assembler()
    now = 0.0
    found: list[Event] = []
    arrived: dict[int, float] = {}
    for position, (serial, number, wait) in enumerate(steps):
        now += wait
        found += assembler.expire(now)
        assert assembler.due is None or now < assembler.due <= now + WAIT_SECONDS
        arrived[position] = now
        found += assembler.add(make(number, serial, f"n={position}"), now)
    found += assembler.flush()
    kept = [int(record.body[2:]) for event in found for record in event.records]
    assert sorted(kept) == [n for n, (_, number, _) in enumerate(steps) if number != types.EOE]
    firsts = [min(int(record.body[2:]) for record in event.records) for event in found]
    assert firsts == sorted(firsts)
    assert all(len({record.event for record in event.records}) == 1 for event in found)
