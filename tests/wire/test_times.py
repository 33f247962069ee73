from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.wire.durations import format_duration, parse_duration
from plexd.wire.times import format_time, parse_nanoseconds, parse_time, signed_form, to_utc


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2026-03-01T12:30:15Z", "2026-03-01T12:30:15Z"),
        ("2026-03-01T12:30:15.120Z", "2026-03-01T12:30:15.12Z"),
        ("2026-03-01T12:30:15.123456789Z", "2026-03-01T12:30:15.123456789Z"),
        ("2026-03-01T12:30:15.1234567899Z", "2026-03-01T12:30:15.123456789Z"),
        ("2026-03-01T01:30:15+02:00", "2026-02-28T23:30:15Z"),
        ("2026-12-31T23:30:15.5-01:00", "2027-01-01T00:30:15.5Z"),
        ("1969-12-31T23:59:59.75Z", "1969-12-31T23:59:59.75Z"),
        ("2024-02-29T00:00:00-00:00", "2024-02-29T00:00:00Z"),
        ("0001-01-01T00:00:00Z", ""),
        ("0001-01-01T00:00:00.000+00:00", ""),
        ("", ""),
    ],
)
def test_time_is_read_with_any_offset_and_written_in_utc(text: str, utc: str) -> None:
    assert to_utc(text) == utc
    assert to_utc(utc) == utc


@pytest.mark.parametrize(
    "text",
    ["2026-03-01", "2026-03-01t12:00:00Z", "2026-03-01T12:00:00z", "2026-03-01 12:00:00Z", "2026-03-01T12:00:00",
     "2026-02-29T12:00:00Z", "2026-13-01T12:00:00Z", "2026-03-01T24:00:00Z", "2026-03-01T12:60:00Z",
     "2026-03-01T12:00:60Z", "2026-03-01T12:00:00.Z", "2026-03-01T12:00:00+24:00", "2026-03-01T12:00:00+01:60",
     "2026-03-01T12:00:00+0100", "2026-03-01T12:00:00,5Z", " 2026-03-01T12:00:00Z", "2026-03-01T12:00:00Z\n",
     "٢٠٢٦-03-01T12:00:00Z", "0000-01-01T00:00:00Z", "0001-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00"],
)  # fmt: skip
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^is not"):
        to_utc(text)


def test_moments_are_unix_seconds() -> None:
    assert parse_time("2026-03-01T12:00:00.5Z") == 1772366400.5
    assert parse_nanoseconds("2026-03-01T12:00:00.000000001Z") == 1772366400_000000001
    assert parse_time("") is None
    assert format_time(1772366400.5) == "2026-03-01T12:00:00.5Z"
    assert format_time(0) == "1970-01-01T00:00:00Z"


@given(st.integers(0, 4_000_000_000_000_000))
def test_written_moment_reads_back_to_the_microsecond(microseconds: int) -> None:
    text = format_time(microseconds / 1_000_000)
    assert round((parse_time(text) or 0.0) * 1_000_000) == round(microseconds / 1_000_000 * 1_000_000)


@pytest.mark.parametrize(
    ("text", "signed"),
    [
        ("2026-03-01T11:15:00.120000000+02:00", "2026-03-01T11:15:00.12+02:00"),
        ("2026-03-01T09:15:00.000+00:00", "2026-03-01T09:15:00Z"),
        ("2026-03-01T09:15:00-00:00", "2026-03-01T09:15:00Z"),
        ("2026-03-01T09:15:00.1234567891Z", "2026-03-01T09:15:00.123456789Z"),
        ("2026-03-01T09:15:00.0000000009Z", "2026-03-01T09:15:00Z"),
        ("2026-03-01T09:15:00-01:00", "2026-03-01T09:15:00-01:00"),
    ],
)
def test_signed_form_keeps_the_offset(text: str, signed: str) -> None:
    assert signed_form(text) == signed


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.35, "350ms"), (2.34, "2.34s"), (59.9996, "1m0s"), (90, "1m30s"), (120, "2m0s"), (4500, "1h15m0s"),
     (259200, "72h0m0s"), (3605, "1h0m5s"), (0.001, "1ms"), (0.0004, "0s"), (1, "1s"), (3600.5, "1h0m0.5s")],
)  # fmt: skip
def test_duration_is_written_as_go_does(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("+0", 0), ("-0", 0), ("-0s", 0), ("1.5ms", 0.0015), ("12.3456789s", 12.3456789), ("1h15m0s", 4500),
     (".5s", 0.5), ("5.s", 5), ("+5s", 5), ("1\u00b5s", 1e-6), ("1\u03bcs", 1e-6), ("1us", 1e-6), ("1ns", 1e-9),
     ("1m1m", 120), ("9223372036s", 9223372036), ("0" * 5000 + "1s", 1), ("0." + "1" * 5000 + "s", 1 / 9)],
)  # fmt: skip
def test_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds, rel=1e-8)


@pytest.mark.parametrize(
    "text",
    ["", "-", "+", "s", ".s", "1", "1.5", "-1s", "5 s", " 5s", "5s ", "1d", "1S", "--1s", "1e3s", "٣s", "1s\n", "00",
     "9223372037s", "99999999999999h", "9" * 5000 + "s"],
)  # fmt: skip
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^is "):
        parse_duration(text)


@given(st.integers(0, 10**12))
def test_written_duration_reads_back_to_the_millisecond(milliseconds: int) -> None:
    assert round(parse_duration(format_duration(milliseconds / 1000)) * 1000) == milliseconds
