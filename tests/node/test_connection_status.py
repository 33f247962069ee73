"""What is remembered of the contact to the control plane."""

from __future__ import annotations

import pytest

from plexd.node.connection_status import ConnectionStatus, Stream


class Clock:
    """Wall clock and monotonic clock, a thousand seconds apart."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def unix(self) -> float:
        return 1000 + self.seconds

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def contact(clock: Clock) -> ConnectionStatus:
    return ConnectionStatus(clock.unix, clock.monotonic)


def test_nothing_has_happened_at_the_start(contact: ConnectionStatus) -> None:
    assert (contact.stream, contact.reconnects) == (Stream.STOPPED, 0)
    assert (contact.last_event_at, contact.last_heartbeat_at, contact.last_heartbeat_ok) == (None, None, None)
    assert (contact.last_pull_at, contact.last_pull_error) == (None, "")


def test_first_connection_is_no_reconnection(contact: ConnectionStatus) -> None:
    counts = []
    for _ in range(3):
        contact.stream_is(Stream.CONNECTED)
        counts.append(contact.reconnects)
        contact.stream_is(Stream.CONNECTING)
    assert counts == [0, 1, 2]


def test_failed_pull_keeps_the_time_of_the_last_good_one(contact: ConnectionStatus, clock: Clock) -> None:
    contact.state_pulled()
    clock.seconds = 60
    contact.state_pulled("no route to host")
    assert (contact.last_pull_at, contact.last_pull_error) == (1000, "no route to host")
    contact.state_pulled()
    assert (contact.last_pull_at, contact.last_pull_error) == (1060, "")


def test_refused_heartbeat_is_remembered_as_one(contact: ConnectionStatus, clock: Clock) -> None:
    contact.heartbeat_sent(True)
    clock.seconds = 30
    contact.heartbeat_sent(False)
    assert (contact.last_heartbeat_at, contact.last_heartbeat_ok) == (1030, False)


def test_silence_counts_from_the_last_news_of_either_way(contact: ConnectionStatus, clock: Clock) -> None:
    clock.seconds = 20
    assert contact.silent_seconds() == 20
    contact.state_pulled()
    clock.seconds = 50
    contact.state_pulled("refused")
    assert contact.silent_seconds() == 30
    contact.stream_is(Stream.CONNECTED)
    clock.seconds = 500
    assert contact.silent_seconds() == 0
    contact.stream_is(Stream.CONNECTING)
    clock.seconds = 510
    assert contact.silent_seconds() == 10
