import pytest

from plexd.mesh.age import format_age


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"), (0, "0s"), (0.9, "0s"), (12.7, "12s"), (59.9, "59s"), (60, "1m"), (250, "4m10s"), (3599, "59m59s"),
        (3600, "1h"), (8164, "2h16m"), (86400, "1d"), (100_000, "1d3h"), (86_400 * 400, "400d"),
    ],
)  # fmt: skip
def test_age_has_two_units_at_most(seconds: float, text: str) -> None:
    assert format_age(seconds) == text
