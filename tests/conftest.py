"""Settings of every test: coroutine tests, and property tests without a limit on the time of one example."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

from plexd import masking
from tests.coroutine_tests import pytest_pyfunc_call  # noqa: F401 - a hook

settings.register_profile("plexd", deadline=None, print_blob=True)
settings.load_profile("plexd")


@pytest.fixture
def own_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For what sets logging up, which is one for the whole process: other tests find it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # set_up would close those of pytest
    monkeypatch.setattr(masking, "_secrets", set())
    monkeypatch.setattr(masking, "_pattern", None)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
