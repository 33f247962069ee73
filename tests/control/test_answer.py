"""Statuses and headers, as the caller has to take them."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd import errors
from plexd.control.answer import describe_status, error_class, parse_http_date, parse_retry_after
from plexd.control.clock import ClockOffset

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        *((status, None) for status in (200, 201, 202, 204, 226, 299)),
        *((status, errors.Misconfigured) for status in (300, 301, 302, 303, 304, 307, 308)),
        *((status, errors.Rejected) for status in (400, 402, 406, 410, 415, 418, 422, 431, 451)),
        *((status, errors.Transient) for status in (408, 425, 500, 502, 503, 504, 520, 599, 100, 101, 600)),
        *((status, errors.NotFound) for status in (404, 405, 501)),
        (401, errors.Unauthenticated),
        (403, errors.Forbidden),
        (409, errors.Conflict),
        (413, errors.TooLarge),
        (429, errors.RateLimited),
    ],
)
def test_every_status_has_its_class(status: int, expected: type[errors.ControlError] | None) -> None:
    assert error_class(status) is expected


def test_a_status_without_name_is_told_by_number() -> None:
    assert (describe_status(404), describe_status(599)) == ("404 Not Found", "599")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7.0),
        (" 120 ", 120.0),
        ("0", 1.0),
        ("3600", 3600.0),
        ("3601", 3600.0),
        ("9" * 5000, 3600.0),
        ("Sun, 01 Mar 2026 12:00:30 GMT", 30.0),
        ("Sunday, 01-Mar-26 12:00:30 GMT", 30.0),
        ("Sun Mar  1 12:00:30 2026", 30.0),
        ("Sun, 01 Mar 2026 11:00:00 GMT", 1.0),
        ("Sun, 01 Mar 2026 23:00:00 GMT", 3600.0),
        ("", None),
        ("-1", None),
        ("1.5", None),
        ("1e3", None),
        ("+5", None),
        ("٣", None),
        ("soon", None),
        ("5, 5", None),
        ("Sun, 41 Mar 2026 12:00:30 GMT", None),
        ("Sun, 01 Mar 99999 12:00:30 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_clamped(text: str, seconds: float | None) -> None:
    assert parse_retry_after(text, NOW) == seconds


def test_retry_after_of_a_heartbeat_is_five_minutes_at_most() -> None:
    assert parse_retry_after("3000", NOW, longest=300.0) == 300.0


@given(st.text())
def test_no_text_breaks_retry_after(text: str) -> None:
    seconds = parse_retry_after(text, NOW)
    assert seconds is None or 1.0 <= seconds <= 3600.0


@given(st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)))  # noqa: DTZ001 - the zone is added below
def test_any_date_is_read_back(moment: datetime) -> None:
    moment = moment.replace(microsecond=0, tzinfo=UTC)
    assert parse_http_date(format_datetime(moment, usegmt=True)) == moment.timestamp()


@pytest.mark.parametrize(
    ("differences", "offset"),
    [([73.0], 73.0), ([1.0, 3.0], 2.0), ([0.0, 0.0, 900.0], 0.0), ([9.0, 1.0, 2.0, 3.0, 4.0, 5.0], 3.0)],
)
def test_clock_offset_is_the_median_of_the_last_five(differences: list[float], offset: float) -> None:
    clock = ClockOffset()
    assert [clock.add(NOW + difference, NOW) for difference in differences][-1] == offset
