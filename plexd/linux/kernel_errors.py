"""What the kernel's error numbers mean for the operator: sentences that say what to do, and types of `plexd.errors`."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass

from plexd.errors import KernelError, NotPermitted, PortInUse
from plexd.mesh.changes import (
    AddAddress,
    AddRoute,
    Change,
    CreateLink,
    DeleteLink,
    DeviceChange,
    Outcome,
    PutPeer,
    RemoveAddress,
    RemovePeer,
    RemoveRoute,
    RenewSessions,
    SetAlias,
    SetDevice,
    SetDown,
    SetMtu,
    SetUp,
)


@dataclass(frozen=True, slots=True)
class KernelErrors:
    """Errors of work on `interface`; `section` is the part of the configuration that names interface and port."""

    interface: str
    section: str

    @contextlib.contextmanager
    def translated(self, doing: str, change: Change | None = None) -> Iterator[None]:
        """Raise KernelError for an OSError. `doing` follows "could not"."""
        try:
            yield
        except OSError as exc:
            raise self.translate(exc, doing, change) from exc

    @contextlib.contextmanager
    def collected(self, failures: list[str], doing: str) -> Iterator[None]:
        """Add the sentence of a KernelError or OSError to `failures` instead of raising."""
        try:
            with self.translated(doing):
                yield
        except KernelError as exc:
            failures.append(str(exc))

    def translate(self, exc: OSError, doing: str, change: Change | None = None) -> KernelError:
        code = exc.errno
        if code in {errno.EPERM, errno.EACCES}:
            return NotPermitted(f"no permission to {doing}: run as root or grant CAP_NET_ADMIN")
        if code == errno.EADDRINUSE:
            port = f" {change.listen_port}" if isinstance(change, CreateLink | SetDevice) else ""
            return PortInUse(f"UDP port{port} is in use by another program: stop it or set {self.section}.listen_port")
        if isinstance(exc, TimeoutError):
            return KernelError(f"could not {doing}: no answer within 5 s")
        if code in {errno.ENODEV, errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET}:
            return KernelError(f"could not {doing}: {self.interface} is gone")
        if code == errno.EEXIST and isinstance(change, AddRoute):
            return KernelError(f"could not {doing}: another program has a route with this prefix and metric, remove it")
        return KernelError(f"could not {doing}: {exc.strerror}")


def failed(change: Change, cause: KernelError) -> Outcome:
    return Outcome(change, str(cause), cause)


def describe(change: DeviceChange) -> str:
    """The work of a change, as it follows "could not"."""
    match change:
        case CreateLink():
            return "create a WireGuard interface"
        case DeleteLink():
            return "delete the interface"
        case SetAlias():
            return "set the alias"
        case SetDevice():
            return "set key and port"
        case RenewSessions():
            return "renew the sessions"
        case AddAddress(address):
            return f"add address {address}"
        case RemoveAddress(address):
            return f"remove address {address}"
        case SetMtu(mtu):
            return f"set MTU {mtu}"
        case SetUp():
            return "bring the interface up"
        case SetDown():
            return "take the interface down"
        case RemovePeer(peer_id, public_key):
            return f"remove peer {peer_id or public_key.short}"
        case PutPeer(peer_id):
            return f"write peer {peer_id}"
        case AddRoute(route):
            return f"add route {route.prefix}"
        case RemoveRoute(route):
            return f"remove route {route.prefix}"
