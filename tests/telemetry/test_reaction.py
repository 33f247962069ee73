"""The table of section 2.5."""

import pytest

from plexd.control.answer import error_class
from plexd.telemetry.reaction import Answer, Reaction, react

TABLE = [
    (400, Answer.DIVIDE), (422, Answer.DIVIDE), (409, Answer.DIVIDE), (418, Answer.DIVIDE), (413, Answer.HALVE),
    (415, Answer.RETRY), (401, Answer.IDENTITY), (403, Answer.PAUSE), (404, Answer.PAUSE),
    (405, Answer.UNPROVISIONED), (501, Answer.UNPROVISIONED), (408, Answer.RETRY), (425, Answer.RETRY),
    (429, Answer.RETRY), (500, Answer.RETRY), (503, Answer.RETRY), (302, Answer.RETRY), (None, Answer.RETRY),
]  # fmt: skip


@pytest.mark.parametrize(("status", "answer"), TABLE)
def test_status_has_its_reaction(status: int | None, answer: Answer) -> None:
    kind = error_class(status if status is not None else 500)
    assert kind is not None
    assert react(kind("", status=status)).answer is answer


def test_pauses_have_their_lengths() -> None:
    def seconds(status: int) -> float:
        kind = error_class(status)
        assert kind is not None
        return react(kind("", status=status)).seconds

    assert [seconds(status) for status in (403, 404, 405, 501)] == [300, 300, 900, 900]


def test_retry_after_is_a_floor() -> None:
    kind = error_class(429)
    assert kind is not None
    assert react(kind("", status=429, retry_after=120.0)) == Reaction(Answer.RETRY, 120.0)
