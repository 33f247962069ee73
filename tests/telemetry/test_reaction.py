"""The table of docs/contract/telemetry.md §2.5."""

import pytest

from plexd.control.answer import error_class
from plexd.telemetry.reaction import NextDelivery, react

TABLE = [
    (400, NextDelivery.DIVIDE),
    (422, NextDelivery.DIVIDE),
    (409, NextDelivery.DIVIDE),
    (418, NextDelivery.DIVIDE),
    (413, NextDelivery.HALVE),
    (415, NextDelivery.RETRY),
    (401, NextDelivery.IDENTITY),
    (403, NextDelivery.PAUSE),
    (404, NextDelivery.PAUSE),
    (405, NextDelivery.UNPROVISIONED),
    (501, NextDelivery.UNPROVISIONED),
    (408, NextDelivery.RETRY),
    (425, NextDelivery.RETRY),
    (429, NextDelivery.RETRY),
    (500, NextDelivery.RETRY),
    (503, NextDelivery.RETRY),
    (302, NextDelivery.RETRY),
    (None, NextDelivery.RETRY),
]


@pytest.mark.parametrize(("status", "answer"), TABLE)
def test_status_has_its_reaction(status: int | None, answer: NextDelivery) -> None:
    kind = error_class(status if status is not None else 500)
    assert kind is not None
    assert react(kind("", status=status)).answer is answer


def test_pauses_have_their_lengths() -> None:
    def seconds(status: int) -> float:
        kind = error_class(status)
        assert kind is not None
        return react(kind("", status=status)).seconds

    assert [seconds(status) for status in (403, 404, 405, 501)] == [300, 300, 900, 900]
