"""What a pass looks at, plans and applies: the mesh is one resource, another WireGuard interface or table is the next.

A resource speaks of one interface, or one nftables table, or both. The resources of a pass do not know each other: the
pass takes them in order under one lock, and a resource that fails is only its own failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from plexd.errors import KernelError
from plexd.mesh.changes import Change, Outcome, Subject
from plexd.mesh.drift import Correction


class Look(Protocol):
    """One comparison of a resource with what is wanted of it.

    `due` are the changes that the comparison asks for. `is_repair` is False when the wanted state has changed since the
    last pass: such changes are news and no repair, so the repair limiter does not hold them back.
    """

    @property
    def due(self) -> tuple[Change, ...]: ...

    @property
    def is_repair(self) -> bool: ...

    def admit(self, admitted: tuple[Change, ...]) -> tuple[Change, ...]:
        """The changes to apply when the repair limiter admits only `admitted` of those that are due."""

    async def apply(self, changes: Sequence[Change]) -> list[Outcome]:
        """Try each change. Raises KernelError when none can be tried."""

    def settle(self, changes: Sequence[Change], outcomes: Sequence[Outcome]) -> tuple[Correction, ...]:
        """Remember what was reached; the corrections that a drift report would hold."""


class Resource(Protocol):
    @property
    def subject(self) -> Subject: ...

    async def look(self, *, whole: bool) -> Look | None:
        """Compare the kernel with what is wanted; None while it is not known what is wanted. Raises KernelError.

        Without `whole` the look may leave out what no notification tells of, such as WireGuard's peers.
        """

    async def look_at_event(self) -> Look | None:
        """Compare what is wanted now with what was applied last, without a look; None when that takes a pass."""

    def failed(self, error: KernelError, *, is_news: bool) -> None:
        """The resource could not be looked at or changed. `is_news` is False for the error of the pass before."""
