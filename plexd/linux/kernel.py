"""The network of this host as the kernel has it: WireGuard interfaces, nftables tables, and what changes about them."""

from __future__ import annotations

import asyncio
import errno
from typing import Literal

from plexd.errors import KernelError
from plexd.linux import notifications
from plexd.linux.firewall import FirewallTable
from plexd.linux.interface import Interface, InterfaceName
from plexd.linux.kernel_errors import KernelErrors
from plexd.linux.network import host_addresses, local_addresses
from plexd.mesh.keys import PublicKey
from plexd.mesh.observed import MESH_SECTION

WITHOUT_NFTABLES_SECONDS = 60.0  # between looks for nftables where the kernel has none


class Kernel:
    """`damaged` is set when a userspace WireGuard died.

    While `watch` runs, `noticed` is set when the network may differ from what the last look showed, and `readdressed`
    when an interface that is not plexd's gets or loses an address.
    """

    def __init__(self) -> None:
        self.damaged = asyncio.Event()
        self.noticed = asyncio.Event()
        self.readdressed = asyncio.Event()
        self._interfaces: list[Interface] = []
        self._tables: list[FirewallTable] = []
        self._errors = KernelErrors("the interface", MESH_SECTION)

    def interface(
        self, name: InterfaceName, backend: Literal["auto", "kernel", "userspace"], userspace_program: str
    ) -> Interface:
        """A WireGuard interface to drive and to watch. Nothing is created yet."""
        interface = Interface(name, backend, userspace_program, self.damaged, self.noticed)
        self._interfaces.append(interface)
        return interface

    def table(self, name: str) -> FirewallTable:
        """An nftables table of family inet to drive and to watch. Nothing is created yet."""
        table = FirewallTable(name)
        self._tables.append(table)
        return table

    @property
    def netlink_writes(self) -> int:
        """The number of messages, on netlink or UAPI or through nft, that were sent to change something."""
        return sum(each.writes for each in self._interfaces) + sum(each.writes for each in self._tables)

    async def watch(self) -> None:
        """Set `noticed` at changes of links, addresses and routes, until cancelled. Raises KernelError.

        A route of ours that comes or goes as its interface's `is_wanted` says is passed over: most are our own work.
        """
        with self._errors.translated("listen for changes of the network"):
            await notifications.watch(self._interfaces, self.noticed, self.readdressed)

    async def watch_firewall(self) -> None:
        """Set `noticed` when one of our tables may have been changed, until cancelled. Raises KernelError."""
        async with asyncio.TaskGroup() as group:
            for table in self._tables:
                group.create_task(self._watch_table(table), name=f"watch table {table.name}")

    async def _watch_table(self, table: FirewallTable) -> None:
        while True:
            with self._errors.translated("listen for changes of the firewall"):
                try:
                    await table.watch(self.noticed)
                except OSError as exc:
                    if exc.errno not in {errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT}:
                        raise
                    await asyncio.sleep(WITHOUT_NFTABLES_SECONDS)  # the module may still be loaded

    async def local_addresses(self) -> frozenset[bytes]:
        """The addresses of every interface of this host. Raises KernelError."""
        with self._errors.translated("list the addresses of this host"):
            return await local_addresses()

    async def host_addresses(self) -> frozenset[bytes]:
        """The addresses that reach beyond their link, of interfaces that are not plexd's. Raises KernelError."""
        with self._errors.translated("list the addresses of this host"):
            return await host_addresses([interface.name for interface in self._interfaces])

    async def tear_down(self, own_public: PublicKey | None) -> list[str]:
        """Remove the interfaces that are ours, and the tables; the names of what was removed.

        `own_public` is the public key that also marks an interface as ours. Every step is tried; KernelError then tells
        what failed.
        """
        removed: list[str] = []
        failures: list[str] = []
        for interface in self._interfaces:
            with self._errors.collected(failures, f"remove {interface.name}"):
                if await interface.tear_down(own_public):
                    removed.append(interface.name)
        for table in self._tables:
            with self._errors.collected(failures, f"delete table {table.name}"):
                if await table.remove():
                    removed.append(table.name)
        if failures:
            raise KernelError("; ".join(failures))
        return removed

    async def close(self) -> None:
        """Let go of everything. Interfaces and tables stay as they are."""
        for interface in self._interfaces:
            interface.close()
        for table in self._tables:
            await table.close()
