"""The changes that a plan consists of. The same values are logged, applied and reported as drift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from plexd.errors import KernelError
from plexd.mesh.address import Endpoint, Prefix
from plexd.mesh.firewall import Ruleset
from plexd.mesh.keys import PresharedKey, PrivateKey, PublicKey
from plexd.mesh.observed import Route


@dataclass(frozen=True, slots=True)
class ReplaceTable:
    """Replace the nftables table by the one of the ruleset, in one transaction."""

    ruleset: Ruleset


@dataclass(frozen=True, slots=True)
class RemoveTable:
    """Delete the nftables table; deleting an absent table succeeds."""


@dataclass(frozen=True, slots=True)
class CreateLink:
    """Create the interface with its alias, key and port, and leave it down. An existing link is an error."""

    private_key: PrivateKey
    listen_port: int
    mtu: int


@dataclass(frozen=True, slots=True)
class DeleteLink:
    """Delete the interface; deleting what is gone succeeds. `reason` is for the log."""

    reason: str


@dataclass(frozen=True, slots=True)
class SetAlias:
    pass


@dataclass(frozen=True, slots=True)
class SetDevice:
    """Private key and listen port of the device; `fwmark` is set to 0. `fields` names what differed."""

    private_key: PrivateKey
    listen_port: int
    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AddAddress:
    address: Prefix


@dataclass(frozen=True, slots=True)
class RemoveAddress:
    address: Prefix


@dataclass(frozen=True, slots=True)
class SetMtu:
    mtu: int


@dataclass(frozen=True, slots=True)
class SetUp:
    pass


@dataclass(frozen=True, slots=True)
class SetDown:
    """Take the interface down, because it must not carry packets without its table."""


class RemovePeer(NamedTuple):
    """`peer_id` is None for a peer that is not in the target."""

    peer_id: str | None
    public_key: PublicKey


class PutPeer(NamedTuple):
    """Add a peer, or change one. A part that is None stays as it is in the device.

    With `is_new` the peer is added or replaced as a whole; otherwise the peer must exist and only the given parts
    change (UPDATE_ONLY). `fields` names the parts that differed, for log and drift.
    """

    peer_id: str
    public_key: PublicKey
    is_new: bool
    psk: PresharedKey | None
    endpoint: Endpoint | None
    keepalive: int | None
    allowed_ips: tuple[Prefix, ...] | None
    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AddRoute:
    """Add, or replace the route of the same prefix and metric."""

    route: Route


@dataclass(frozen=True, slots=True)
class RemoveRoute:
    route: Route


@dataclass(frozen=True, slots=True)
class RenewSessions:
    """Have peers shake hands at once, because a new private key ended their sessions.

    WireGuard itself waits for a packet to send, and the other node may have tried while the old key was in force.
    """

    public_keys: tuple[PublicKey, ...]
    keepalive: int


PeerChange = RemovePeer | PutPeer
TableChange = ReplaceTable | RemoveTable
DeviceChange = (
    CreateLink | DeleteLink | SetAlias | SetDevice | AddAddress | RemoveAddress | SetMtu | SetUp | SetDown | RemovePeer
    | PutPeer | AddRoute | RemoveRoute | RenewSessions
)  # fmt: skip
Change = TableChange | DeviceChange


class Subject(NamedTuple):
    """The interface or the nftables table, or both, that changes are about: "plexd0" and "inet plexd"."""

    interface: str = ""
    table: str = ""

    @property
    def name(self) -> str:
        return self.interface or self.table


class Outcome(NamedTuple):
    """The result of a change. `error` is one sentence, None after success; `cause` is the exception behind it."""

    change: Change
    error: str | None = None
    cause: KernelError | None = None
