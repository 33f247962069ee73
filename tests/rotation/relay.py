"""A long way between two nodes: every datagram arrives later. `python -m tests.rotation.relay SECONDS HOST NODE NODE`.

The first node is reached at port 40001 of HOST and the second at 40002; each NODE is `address:port`. What comes in at
one port goes out of the other, so that each node sees its peer at the endpoint it knows.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from typing import Any

PORTS = (40_001, 40_002)


class Door(asyncio.DatagramProtocol):
    """Where one node is reached from the other."""

    def __init__(self, seconds: float, node: tuple[str, int]) -> None:
        self.opposite: asyncio.DatagramTransport | None = None
        self._seconds = seconds
        self._node = node

    def datagram_received(self, data: bytes, address: tuple[str | Any, int]) -> None:
        asyncio.get_running_loop().call_later(self._seconds, self._pass_on, data)

    def _pass_on(self, data: bytes) -> None:
        if self.opposite is not None:
            self.opposite.sendto(data, self._node)


async def main(seconds: float, host: str, *nodes: str) -> None:
    loop = asyncio.get_running_loop()
    opened = []
    for port, node in zip(PORTS, nodes, strict=True):
        address, _, node_port = node.rpartition(":")
        make = partial(Door, seconds, (address, int(node_port)))
        opened.append(await loop.create_datagram_endpoint(make, local_addr=(host, port)))
    (transport, door), (other_transport, other_door) = opened
    door.opposite, other_door.opposite = other_transport, transport
    print("open", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), *sys.argv[2:]))
