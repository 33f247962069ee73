"""What the services are put on to be watched: a node, a clock, and a control plane that signs its events."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from nacl.signing import SigningKey
from pydantic import SecretStr

from plexd.errors import ControlError
from plexd.mesh import firewall
from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.desired import Desired, FullState, Peer, SigningKeys
from plexd.mesh.keys import NO_PRESHARED_KEY, PrivateKey, PublicKey
from plexd.mesh.target import Settings
from plexd.node.health import Health
from plexd.node.state import Node
from plexd.store.identity import Identity
from plexd.wire.envelope import seal
from plexd.wire.mapping import OwnNode
from plexd.wire.times import format_time

EPOCH = 1_800_000_000.0  # Unix seconds at the start of a loop in virtual time
OWN_KEY = PrivateKey(bytes([8] * 32))
NODE_ID = "n_self"
OLD_KEY, NEW_KEY, STRANGER = (SigningKey(bytes([n] * 32)) for n in (1, 2, 3))
_numbers = itertools.count(1)


def unix_time() -> float:
    """The wall clock that goes with the loop's own."""
    return EPOCH + asyncio.get_running_loop().time()


def public(key: SigningKey) -> bytes:
    return bytes(key.verify_key)


def signing_text(key: SigningKey) -> str:
    return base64.b64encode(public(key)).decode()


def public_key(number: int) -> PublicKey:
    return PublicKey(bytes([number] * 32))


def peer(number: int, *prefixes: str, endpoint: str = "", key: PublicKey | None = None) -> Peer:
    mesh_ip = parse_ip(f"10.100.0.{number}")
    allowed_ips = (Prefix.host(mesh_ip), *map(Prefix.parse, prefixes))
    return Peer(f"n_{number}", key or public_key(number), mesh_ip, endpoint, allowed_ips, NO_PRESHARED_KEY)


def wire_peer(number: int, **members: Any) -> dict[str, Any]:
    """The same peer as the control plane writes it."""
    mesh_ip = f"10.100.0.{number}"
    return {
        "id": f"n_{number}", "public_key": str(public_key(number)), "mesh_ip": mesh_ip, "endpoint": "",
        "allowed_ips": [f"{mesh_ip}/32"], "psk": "",
    } | members  # fmt: skip


def state_of(*peers: Peer, signing_keys: SigningKeys | None = None) -> FullState:
    return FullState(peers, (), (), signing_keys, {}, {}, {}, {})


def desired_of(*peers: Peer, key: SigningKey = OLD_KEY) -> Desired:
    return Desired(peers={p.id: p for p in peers}, signing_keys=SigningKeys(public(key)))


def make_identity(private_key: PrivateKey | None = OWN_KEY, node_key: str = "node-key-of-the-stage") -> Identity:
    return Identity(NODE_ID, parse_ip("10.100.0.1"), SecretStr(node_key), private_key)


def make_node(*peers: Peer, health: Health | None = None, identity: Identity | None = None) -> Node:
    return Node(identity or make_identity(), desired_of(*peers), 0.0, health or Health())


def own_node() -> OwnNode:
    return OwnNode(NODE_ID, parse_ip("10.100.0.1"), OWN_KEY.public())


def settings_of(identity: Identity) -> Settings | None:
    if identity.private_key is None:
        return None
    return Settings(identity.node_id, "plexd0", identity.private_key, identity.mesh_ip, 51820, 0, 25, None)


def enforcing(identity: Identity) -> Settings | None:
    """The same where policy is enforced."""
    settings = settings_of(identity)
    return settings and replace(settings, policy=firewall.Settings(identity.mesh_ip, ("plexd0",)))


def envelope(
    event_type: str,
    payload: Any = None,
    *,
    key: SigningKey = OLD_KEY,
    event_id: str | None = None,
    nonce: str | None = None,
    issued: float | None = None,
) -> str:
    """The data of a signed event; to be made at the moment it is sent."""
    number = next(_numbers)
    return seal(
        key,
        event_type=event_type,
        event_id=event_id or f"ev-{number}",
        issued_at=format_time(unix_time() if issued is None else issued),
        nonce=nonce or f"nonce-{number}",
        payload=json.dumps(payload),
    )


def sse(data: str, event_id: str | None) -> bytes:
    named = f"id: {event_id}\n" if event_id is not None else ""
    return f"{named}data: {data}\n\n".encode()


def send(event_type: str, payload: Any = None, sse_id: str | None = None, **how: Any) -> Callable[[], bytes]:
    """A step of a stream: this event, signed when its turn comes."""
    return lambda: sse(envelope(event_type, payload, **how), sse_id)


Step = bytes | float | Exception | Callable[[], bytes]
FOREVER = float("inf")


@dataclass
class Streams:
    """A control plane's event streams. Connection n (from 1) plays `script(n)`, or fails with the error it returns.

    A step is bytes to send, seconds of silence, or the error that ends it.
    """

    script: Callable[[int], Sequence[Step] | ControlError]
    attempts: list[tuple[float, str | None]] = field(default_factory=list)
    open: int = 0

    @asynccontextmanager
    async def events(self, last_event_id: str | None) -> AsyncIterator[AsyncIterator[bytes]]:
        self.attempts.append((asyncio.get_running_loop().time(), last_event_id))
        steps = self.script(len(self.attempts))
        await asyncio.sleep(0.001)  # a connection is never there at once
        if isinstance(steps, ControlError):
            raise steps
        self.open += 1
        try:
            yield self._play(steps)
        finally:
            self.open -= 1

    async def _play(self, steps: Sequence[Step]) -> AsyncIterator[bytes]:
        for step in steps:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, float):
                await (asyncio.Event().wait() if step == FOREVER else asyncio.sleep(step))
            elif isinstance(step, bytes):
                yield step
            else:
                yield step()

    @property
    def times(self) -> list[float]:
        return [at for at, _ in self.attempts]

    @property
    def replay_from(self) -> list[str | None]:
        return [last_event_id for _, last_event_id in self.attempts]


@dataclass
class Asked:
    """Takes requests of a service and notes when and why."""

    calls: list[tuple[float, str]] = field(default_factory=list)

    def __call__(self, reason: str) -> None:
        self.calls.append((asyncio.get_running_loop().time(), reason))

    @property
    def reasons(self) -> list[str]:
        return [reason for _, reason in self.calls]

    def times(self, reason: str) -> list[float]:
        return [at for at, why in self.calls if why == reason]


def middle(low: float, high: float) -> float:
    """A random source without chance."""
    return (low + high) / 2


def highest(_low: float, high: float) -> float:
    return high


def lowest(low: float, _high: float) -> float:
    return low
