"""Settings of every test: coroutine tests, and property tests without a limit on the time of one example."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

from plexd import masking
from tests.virtual_time import run_virtual

settings.register_profile("plexd", deadline=None, print_blob=True)
settings.load_profile("plexd")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test in an event loop of its own: in virtual time where the test is marked so."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    run = asyncio.run if pyfuncitem.get_closest_marker("virtual_time") is None else run_virtual
    run(pyfuncitem.obj(**arguments))
    return True


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
