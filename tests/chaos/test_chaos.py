"""Twenty seeds of chaos; `make chaos` runs two hundred."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.harness import run
from tests.telemetry.journald import MARKS

pytestmark = MARKS


@pytest.mark.parametrize("seed", range(1, 21))
def test_every_line_arrives_in_order_or_is_covered_by_a_marker(seed: int, tmp_path: Path) -> None:
    report = run(seed, tmp_path / "run")
    print(report)
    assert not report.problems, str(report)
