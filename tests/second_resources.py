"""A second WireGuard device and a second table as resources of a pass, made without any part of the mesh's code."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plexd.converge.mesh import Interface, Table
from plexd.errors import KernelError
from plexd.mesh.address import Prefix
from plexd.mesh.changes import Change, Outcome, Subject
from plexd.mesh.drift import Correction, pass_corrections
from plexd.mesh.firewall import Ruleset
from plexd.mesh.keys import PrivateKey
from plexd.mesh.observed import Backend, Route
from plexd.mesh.plan import plan, plan_table
from plexd.mesh.target import TargetPeer

ACCESS = "plexd-access"
ALIAS = "plexd:access"


@dataclass(frozen=True)
class DeviceSettings:
    private_key: PrivateKey
    address: Prefix
    interface: str = ACCESS
    alias: str = ALIAS
    section: str = "access"
    listen_port: int = 51999
    mtu: int = 1420
    keepalive: int = 0
    backend: Backend | None = None


@dataclass(frozen=True)
class DeviceTarget:
    settings: DeviceSettings
    peers: Mapping[str, TargetPeer] = field(default_factory=dict)
    routes: frozenset[Route] = frozenset()


@dataclass(frozen=True)
class Look:
    subject: Subject
    due: tuple[Change, ...]
    try_each: Callable[[Any], Awaitable[list[Outcome]]]
    is_repair: bool
    known_table: str | None = None

    def admit(self, admitted: tuple[Change, ...]) -> tuple[Change, ...]:
        return admitted

    async def apply(self, changes: Sequence[Change]) -> list[Outcome]:
        return await self.try_each(changes)

    def settle(self, changes: Sequence[Change], outcomes: Sequence[Outcome]) -> tuple[Correction, ...]:
        return pass_corrections(self.subject, outcomes, {}, self.known_table) if self.is_repair else ()


class SecondDevice:
    def __init__(self, interface: Interface, target: DeviceTarget) -> None:
        self.subject = Subject(interface.name)
        self.errors: list[str] = []
        self._interface = interface
        self._target = target
        self._is_known = False

    async def look(self, *, whole: bool) -> Look:
        changes = plan(self._target, await self._interface.observe(), time.time())
        was_known, self._is_known = self._is_known, True
        return Look(self.subject, changes, self._interface.apply, was_known)

    async def look_at_event(self) -> Look:
        return Look(self.subject, (), self._interface.apply, is_repair=False)

    def failed(self, error: KernelError, *, is_news: bool) -> None:
        self.errors.append(str(error))


class SecondTable:
    def __init__(self, table: Table, ruleset: Ruleset) -> None:
        self.subject = Subject(table=table.name)
        self.errors: list[str] = []
        self._table = table
        self._ruleset = ruleset
        self._is_known = False

    async def look(self, *, whole: bool) -> Look:
        changes = plan_table(self._ruleset, await self._table.observe())
        was_known, self._is_known = self._is_known, True
        return Look(self.subject, changes, self._table.apply, was_known, self._ruleset.digest)

    async def look_at_event(self) -> Look:
        return Look(self.subject, (), self._table.apply, is_repair=False)

    def failed(self, error: KernelError, *, is_news: bool) -> None:
        self.errors.append(str(error))
