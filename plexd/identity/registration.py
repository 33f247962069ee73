"""From a bootstrap token to an identity.

The key pair is on disk before the first request and the same in every retry, so a lost answer makes no second node.
The first time `identity.json` is written last: a crash anywhere before it leads back here, with the same key. A node
that registers anew keeps the identity it has until the new one is on disk whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from pydantic import SecretStr

from plexd.errors import (
    Conflict,
    ControlError,
    LocalStateError,
    RegistrationRefused,
    RegistrationTimedOut,
    Transient,
    Unauthenticated,
    WireError,
)
from plexd.log import get_logger
from plexd.masking import register_secret
from plexd.mesh.desired import Desired, FullState
from plexd.mesh.fold import replace_state
from plexd.mesh.keys import PublicKey
from plexd.runtime.waiting import to_its_end
from plexd.store.identity import Identity, IdentityStore
from plexd.store.snapshot import SnapshotStore
from plexd.store.token import BootstrapToken
from plexd.wire.mapping import Registered

log = get_logger("registration")


class ControlPlane(Protocol):
    async def register(self, token: SecretStr, public_key: PublicKey) -> Registered:
        """Retried within the time configured. Raises ControlError, WireError when the answer is not usable."""


@dataclass(frozen=True, slots=True)
class Granted:
    """What a token has bought, not kept yet. `desired` is what the answer says of it: peers and signing keys."""

    identity: Identity
    desired: Desired
    token: BootstrapToken


class Registrar:
    """`on_granted` is told node id and mesh address before they are kept: perhaps twice, never not at all."""

    def __init__(self, control: ControlPlane, identities: IdentityStore, snapshots: SnapshotStore) -> None:
        self.on_granted: list[Callable[[str, bytes], Awaitable[None]]] = []
        self._control = control
        self._identities = identities
        self._snapshots = snapshots

    async def register(self, token: BootstrapToken) -> Identity:
        """Raises RegistrationRefused, RegistrationTimedOut, or LocalStateError when the answer cannot be saved."""
        granted = await self.ask(token)
        try:
            # the token is spent: a stop signal must not lose what it bought
            await to_its_end(self._keep(granted))
        except OSError as exc:
            raise LocalStateError(
                f"registered as {granted.identity.node_id}, but the identity cannot be saved: {exc}; the token may be "
                f"used up: repair the data directory and get a new token"
            ) from exc
        return granted.identity

    async def ask(self, token: BootstrapToken) -> Granted:
        """What the control plane gives for the token, with a key pair that is on disk as pending.

        Raises RegistrationRefused, RegistrationTimedOut, or LocalStateError when the key cannot be stored.
        """
        register_secret(token.value.get_secret_value())
        try:
            key = await to_its_end(asyncio.to_thread(self._identities.make_registration_key))
        except OSError as exc:
            raise LocalStateError(f"cannot store the node's key: {exc}; nothing was sent") from exc
        register_secret(key.reveal())
        try:
            answer = await self._control.register(token.value, key.public())
        except WireError as exc:
            raise RegistrationRefused(f"the control plane's answer to the registration is not usable: {exc}") from exc
        except Transient as exc:
            raise RegistrationTimedOut(f"the control plane cannot be reached: {exc}; plexd tries again later") from exc
        except ControlError as exc:
            raise RegistrationRefused(_refusal(exc)) from exc
        register_secret(answer.node_key.get_secret_value())
        identity = Identity(answer.node_id, answer.mesh_ip, answer.node_key, key)
        log.info("node registered", node_id=identity.node_id, public_key=key.public().short)
        state = FullState(answer.peers, answer.rejected, None, answer.signing_keys, {}, {}, {}, {})
        return Granted(identity, replace_state(Desired(), state), token)

    async def tell(self, granted: Granted) -> None:
        """To be called before `replace`."""
        for witness in self.on_granted:
            await witness(granted.identity.node_id, granted.identity.mesh_ip)

    async def _keep(self, granted: Granted) -> None:
        await self.tell(granted)
        await asyncio.to_thread(self._save, granted)

    def replace(self, granted: Granted) -> None:
        """Keep the identity in the place of the present one, as one: a crash leaves either. Blocks; raises OSError."""
        contents = self._snapshots.contents(granted.identity.node_id, granted.desired, 0.0)
        self._identities.replace(granted.identity, granted.desired.signing_keys, contents)
        _spend(granted.token)

    def _save(self, granted: Granted) -> None:
        identity, signing_keys = granted.identity, granted.desired.signing_keys
        self._identities.commit_registration(identity, signing_keys)
        self._snapshots.save(identity.node_id, granted.desired, fetched_at=0.0)
        self._identities.commit_mark(identity, signing_keys)
        _spend(granted.token)


def _spend(token: BootstrapToken) -> None:
    if token.file is not None:
        try:
            token.file.unlink()
        except OSError as exc:
            log.warning("used token file not removed", path=str(token.file), error=exc.strerror)


def _refusal(exc: ControlError) -> str:
    said = f" (it says: {exc.body})" if exc.body else ""
    if isinstance(exc, Unauthenticated):
        return f"the control plane refuses the bootstrap token: invalid, expired or already used; get a new one{said}"
    if isinstance(exc, Conflict):
        return (
            f"a node with this host name is already registered: set hostname to another, or remove the old node{said}"
        )
    return f"the control plane refuses the registration: {exc}{said}"
