"""Resolves names, again and again: the endpoints of peers that are names, and the name of the control plane."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping

from plexd.errors import Unresolved
from plexd.linux.lookup import has_route, look_up
from plexd.log import get_logger
from plexd.mesh.address import Endpoint, HostPort, parse_endpoint
from plexd.mesh.desired import Desired
from plexd.mesh.target import names_to_resolve
from plexd.node.state import Node
from plexd.runtime.waiting import set_within

log = get_logger("mesh")

REPEAT_SECONDS = 60.0
# A lookup is given up after 5 s, but with three name servers that do not answer its thread lives up to 30 s. Eight at
# once hold at most 48 of the 64 threads that are allowed, which leaves room for connections to the control plane.
AT_ONCE = 8


class Resolve:
    """Looks up each name when it appears and every minute after; writes into `resolved` and requests a pass after news.

    `control_plane` has the addresses of the control plane once they are known: no route may swallow them. Set
    `names_changed` when there may be new names; known names keep their time.
    """

    name = "resolve"

    def __init__(
        self,
        node: Node,
        resolved: MutableMapping[str, Endpoint],
        control_plane_host: str,
        request_pass: Callable[[str], None],
    ) -> None:
        self.names_changed = asyncio.Event()
        self.control_plane: frozenset[bytes] = frozenset()
        self._control_plane_host = control_plane_host
        self._node = node
        self._resolved = resolved
        self._request_pass = request_pass
        self._due: dict[str, float] = {}  # when each name is looked up next, in the loop's time; in that order
        self._seen: Desired | None = None  # the snapshot that the names are from

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        free = asyncio.Semaphore(AT_ONCE)

        async def look_up_and_make_room(name: str) -> None:
            try:
                await self._look_up(name)
            finally:
                free.release()

        self._due, self._seen = {}, None  # a start looks up at once
        async with asyncio.TaskGroup() as lookups:
            lookups.create_task(self._watch_control_plane(), name="control plane's name")
            while True:
                await free.acquire()
                self.names_changed.clear()
                now = loop.time()
                self._take_names(now)
                name, due = next(iter(self._due.items()), ("", now + REPEAT_SECONDS))
                if due > now:
                    free.release()
                    await set_within(self.names_changed, due - now)
                    continue
                del self._due[name]
                self._due[name] = now + REPEAT_SECONDS  # behind the others
                lookups.create_task(look_up_and_make_room(name), name=f"lookup {name}")

    def _take_names(self, now: float) -> None:
        """New names come before names whose minute is over, of which there may be many that never resolve."""
        if self._node.desired is self._seen:
            return
        self._seen = self._node.desired
        names = names_to_resolve(self._seen)
        for gone in self._resolved.keys() - names:
            del self._resolved[gone]
        known = {name: due for name, due in self._due.items() if name in names}
        self._due = dict.fromkeys(sorted(names - known.keys()), now) | known

    async def _watch_control_plane(self) -> None:
        while True:
            found = frozenset(await _addresses(self._control_plane_host))
            if found and found != self.control_plane:
                self.control_plane = found
                self._request_pass("control plane resolved")
            await asyncio.sleep(REPEAT_SECONDS)

    async def _look_up(self, text: str) -> None:
        parsed = parse_endpoint(text)
        assert isinstance(parsed, HostPort)  # noqa: S101 - names_to_resolve yields nothing else
        addresses = await _addresses(parsed.host)
        known = self._resolved.get(text)
        if not addresses or text not in self._due:  # nobody wants it any more
            return
        if known is not None and known.packed in addresses and not _is_cut_off(known.packed, addresses[0]):
            return  # the same addresses in another order are no news
        self._resolved[text] = Endpoint(addresses[0], parsed.port)
        self._request_pass("endpoint names resolved")


def _is_cut_off(known: bytes, first: bytes) -> bool:
    """Whether the host has no route to the address in use, but has a route to another one."""
    return not has_route(known) and has_route(first)


async def _addresses(name: str) -> list[bytes]:
    """Empty when the name does not resolve."""
    try:
        return await look_up(name)
    except Unresolved as exc:
        log.warning("name not resolved", name=name, error=str(exc))
        return []
