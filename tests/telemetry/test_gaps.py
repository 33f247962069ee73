"""Markers of gaps: the first at its place, the next ones added up."""

from plexd.telemetry.gaps import Gap, Gaps, Reason

HOLE = Gap("app.log", Reason.TRUNCATED_FILE, 3, 100.0, 110.0)


def test_first_gap_is_marked_where_it_is() -> None:
    assert Gaps().note(HOLE, 0.0) == HOLE


def test_gaps_within_a_minute_are_added_up_and_marked_after_it() -> None:
    gaps = Gaps()
    gaps.note(HOLE, 0.0)
    assert gaps.note(HOLE, 10.0) is None
    assert gaps.note(HOLE._replace(since=90.0, until=300.0), 20.0) is None
    assert gaps.due_at() == 60.0
    assert gaps.due(59.0) == []
    assert gaps.due(60.0) == [Gap("app.log", Reason.TRUNCATED_FILE, 6, 90.0, 300.0)]
    assert gaps.due_at() is None


def test_sum_with_an_unknown_number_is_unknown() -> None:
    gaps = Gaps()
    gaps.note(HOLE, 0.0)
    gaps.note(HOLE, 1.0)
    gaps.note(HOLE._replace(lost=None), 2.0)
    assert gaps.due(60.0)[0].lost is None


def test_sources_and_reasons_have_markers_of_their_own() -> None:
    gaps = Gaps()
    gaps.note(HOLE, 0.0)
    assert gaps.note(HOLE._replace(source="other.log"), 1.0) is not None
    assert gaps.note(HOLE._replace(reason=Reason.ROTATED_AWAY), 1.0) is not None


def test_gap_is_owed_until_its_marker_is_delivered() -> None:
    gaps = Gaps()
    gaps.note(HOLE, 0.0)
    assert gaps.owed == []  # its source finds it again
    gaps.note(HOLE, 1.0)
    assert gaps.owed == [HOLE]
    (late,) = gaps.due(60.0)
    assert gaps.owed == [HOLE]
    gaps.delivered(late)
    assert gaps.owed == []


def test_gap_owed_by_an_earlier_process_is_due_at_once() -> None:
    gaps = Gaps([HOLE])
    assert gaps.due(0.0) == [HOLE]
    assert gaps.note(HOLE, 1.0) is None


def test_marker_is_spaced_from_the_owed_one_too() -> None:
    gaps = Gaps()
    gaps.note(HOLE, 0.0)
    gaps.note(HOLE, 1.0)
    gaps.due(60.0)
    assert gaps.note(HOLE, 61.0) is None
    assert gaps.note(HOLE._replace(reason=Reason.OVERFLOW), 61.0) is not None
