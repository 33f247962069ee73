"""A hook of pytest that runs coroutine tests."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from tests.virtual_time import run_virtual


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test in an event loop of its own: in virtual time where the test is marked so."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    run = asyncio.run if pyfuncitem.get_closest_marker("virtual_time") is None else run_virtual
    run(pyfuncitem.obj(**arguments))
    return True
