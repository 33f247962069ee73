"""A world that the tests of a module share, until one of them fails in it: the next one gets a new world."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.world import World

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


class SharedWorld:
    """A context manager."""

    def __init__(self, make_directory: Callable[[], Path]) -> None:
        self._make_directory = make_directory
        self._world: World | None = None
        self._undo = ExitStack()
        self._last: pytest.Item | None = None

    def __enter__(self) -> SharedWorld:
        return self

    def __exit__(self, *_: object) -> None:
        with self._undo:
            if self._world is not None and not self._is_spoilt():
                assert self._world.end_agent() == 0

    def given_to(self, test: pytest.Item) -> World:
        """With an agent that is registered, and three peers."""
        if self._is_spoilt():
            self._world = None
            self._undo.close()
        self._last = test
        if self._world is None:
            self._world = self._undo.enter_context(World(self._make_directory()))
            self._world.register()
        return self._world

    def _is_spoilt(self) -> bool:
        return self._last is not None and _FAILED in self._last.stash


@pytest.fixture(scope="module")
def shared_world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedWorld]:
    with SharedWorld(lambda: tmp_path_factory.mktemp(Path(request.node.name).stem)) as shared:
        yield shared


@pytest.fixture
def world(request: pytest.FixtureRequest, shared_world: SharedWorld) -> World:
    """One agent for all tests of a module; modules whose tests want one each say so themselves."""
    return shared_world.given_to(request.node)
