"""The real kernel with the mesh interface and its table, as the daemon puts them together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from plexd.linux.interface import InterfaceName
from plexd.linux.kernel import Kernel
from plexd.mesh.changes import Change, Outcome, RemoveTable, ReplaceTable
from plexd.mesh.firewall import TABLE
from plexd.mesh.observed import MESH_ALIAS, MESH_SECTION, Observed


class MeshKernel(Kernel):
    """`mesh` is the interface, `mesh_table` the table."""

    def __init__(self, name: str, backend: Literal["auto", "kernel", "userspace"], userspace_program: str) -> None:
        super().__init__()
        self.mesh = self.interface(InterfaceName(name, MESH_ALIAS, MESH_SECTION), backend, userspace_program)
        self.mesh_table = self.table(TABLE)

    async def observe(self, endpoints: Collection[bytes] | None = None, *, device: bool = True) -> Observed:
        return await self.mesh.observe(endpoints, device=device)

    async def apply(self, changes: Sequence[Change]) -> list[Outcome]:
        """Table first, as in a pass."""
        table = [change for change in changes if isinstance(change, ReplaceTable | RemoveTable)]
        rest = [change for change in changes if not isinstance(change, ReplaceTable | RemoveTable)]
        return (await self.mesh_table.apply(table) if table else []) + (await self.mesh.apply(rest) if rest else [])

    async def read_firewall(self) -> Any | None:
        return await self.mesh_table.read()
