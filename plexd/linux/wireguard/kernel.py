"""WireGuard in the kernel, spoken to over generic netlink. Sockets and threads; the bytes are made in `messages`."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from plexd.linux.netlink import NETLINK_GENERIC, Message, NetlinkSocket, attribute, attributes
from plexd.linux.wireguard import messages
from plexd.mesh.changes import PeerChange
from plexd.mesh.keys import PrivateKey, PublicKey
from plexd.mesh.observed import Device
from plexd.runtime.threads import in_mesh_thread

NLCTRL = 0x10  # the one generic netlink family with a fixed number
GET_FAMILY = 3
FAMILY_ID, FAMILY_NAME = 1, 2
BULK = 500  # peers: two messages and more


class KernelDevice:
    """The device side of a link of kind wireguard."""

    def __init__(self, interface: str) -> None:
        self.writes = 0
        self._interface = interface
        self._silent: list[PeerChange] = []

    async def dump(self) -> Device | None:
        return await in_mesh_thread(self._dump)

    async def set_device(self, private_key: PrivateKey, listen_port: int) -> None:
        await in_mesh_thread(self._write, [messages.set_device(self._interface, private_key, listen_port)])

    async def change_peers(self, changes: Sequence[PeerChange]) -> None:
        if len(changes) < BULK:
            await in_mesh_thread(self._write, messages.change_peers(self._interface, changes))
            return
        self._silent += changes
        await in_mesh_thread(self._write, _ahead(messages.change_peers(self._interface, changes, silently=True)))

    async def begin_handshakes(self) -> None:
        silent, self._silent = self._silent, []
        if silent:
            await in_mesh_thread(self._write_at_once, list(messages.set_keepalives(self._interface, silent)))

    async def renew_sessions(self, public_keys: Sequence[PublicKey], keepalive: int) -> None:
        payloads = list(messages.restart_keepalives(self._interface, public_keys, keepalive))
        await in_mesh_thread(self._write_at_once, payloads)

    def _dump(self) -> Device | None:
        try:
            with NetlinkSocket(NETLINK_GENERIC) as carrier:
                request = Message(_family(carrier), 0, messages.get_device(self._interface))
                return messages.read_dump(carrier.dump(request))
        except OSError as exc:
            if exc.errno in {errno.ENODEV, errno.EOPNOTSUPP, errno.ENOENT}:  # gone, no WireGuard link, no module
                return None
            raise
        except (ValueError, struct.error) as exc:
            raise OSError(errno.EPROTO, os.strerror(errno.EPROTO)) from exc

    def _write(self, payloads: Iterable[bytes]) -> None:
        refused = 0
        with NetlinkSocket(NETLINK_GENERIC) as carrier:
            family = _family(carrier)
            for payload in payloads:
                self.writes += 1
                (code,) = carrier.send([Message(family, 0, payload)])
                refused = refused or code
        if refused:
            raise OSError(refused, os.strerror(refused))

    def _write_at_once(self, payloads: Sequence[bytes]) -> None:
        """In one system call: after it, as many threads as there are new peers want the processors."""
        with NetlinkSocket(NETLINK_GENERIC) as carrier:
            family = _family(carrier)
            self.writes += len(payloads)
            codes = carrier.send([Message(family, 0, payload) for payload in payloads], at_once=True)
        if refused := next(filter(None, codes), 0):
            raise OSError(refused, os.strerror(refused))


def _ahead(payloads: Iterator[bytes]) -> Iterator[bytes]:
    """The same, each made in another thread while the kernel works on the one before."""
    with ThreadPoolExecutor(1) as encoder:
        following = encoder.submit(next, payloads, None)
        while (payload := following.result()) is not None:
            following = encoder.submit(next, payloads, None)
            yield payload


def _family(carrier: NetlinkSocket) -> int:
    """The number of the WireGuard family, which changes when the module is loaded anew. ENOENT without the module."""
    request = struct.pack("=BBH", GET_FAMILY, 1, 0) + attribute(FAMILY_NAME, messages.FAMILY_NAME)
    for payload in carrier.get(Message(NLCTRL, 0, request)):
        for kind, start, _ in attributes(payload, 4, len(payload)):
            if kind == FAMILY_ID:
                return int(struct.unpack_from("=H", payload, start)[0])
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
