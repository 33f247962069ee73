"""Another identity for a node that runs: one found on disk, or one that a new bootstrap token has bought.

Everything takes it in one step, while the services are paused: nothing of the old node is under way then, and each
service that starts again afterwards is one of the new node (docs/contract/lifecycle.md §5, steps 2, 5 and 6).

The services that end last at a stop are not paused, and need not be. A heartbeat rests while a refusal is looked into;
one that was under way says nothing of the new node. The snapshot is not written meanwhile, and then as the new node's.
Drift is what this machine corrected: as with everything that waits for delivery, the new node delivers it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Protocol

from pydantic import SecretStr

from plexd.errors import LocalStateError, RegistrationRefused, RegistrationTimedOut
from plexd.identity.registration import Granted, Registrar
from plexd.log import get_logger
from plexd.masking import register_secret
from plexd.mesh.desired import Desired
from plexd.node.state import Node
from plexd.runtime.waiting import to_its_end
from plexd.store.identity import Identity, IdentityDamaged, IdentityStore
from plexd.store.snapshot import SnapshotStore
from plexd.store.token import BootstrapToken

log = get_logger("recovery")

REPEAT_ERROR_SECONDS = 600.0


class Tokens(Protocol):
    async def find(self, refused: Collection[SecretStr]) -> BootstrapToken:
        """One that is not in `refused`. Raises RegistrationRefused, with a sentence that says what to do."""

    def forget(self, token: BootstrapToken) -> None: ...


class Reenrolment:
    """`paused` keeps the services from running, `writing` everybody else from the data directory.

    `converge` brings the kernel in line with the new node before its services start.
    """

    def __init__(
        self,
        node: Node,
        identities: IdentityStore,
        snapshots: SnapshotStore,
        registrar: Registrar,
        tokens: Tokens,
        paused: Callable[[], AbstractAsyncContextManager[None]],
        writing: asyncio.Lock,
        converge: Callable[[], Awaitable[object]],
    ) -> None:
        self._node = node
        self._identities = identities
        self._snapshots = snapshots
        self._registrar = registrar
        self._tokens = tokens
        self._paused = paused
        self._writing = writing
        self._converge = converge
        self._refused: set[SecretStr] = set()
        self._complaint = ""
        self._complained_at = float("-inf")

    async def adopt(self) -> bool:
        """Take over the identity on disk if it is not the node's own any more; whether it was another.

        A private key alone makes no other identity: that is the rotation's business.
        """
        try:
            async with self._writing:
                found = await to_its_end(asyncio.to_thread(self._identities.look_again))
            if found is None or _names(found) == _names(self._node.identity):
                return False
            await to_its_end(self._become(found))
        except (IdentityDamaged, LocalStateError, OSError) as exc:
            log.warning("identity on disk not usable", reason=str(exc), next_step="the one in memory stays in force")
            return False
        return True

    async def register(self) -> bool:
        """Register anew, if there is a token that was not refused before; whether the node has a new identity."""
        try:
            token = await self._tokens.find(self._refused)
        except RegistrationRefused as exc:
            self._complain(str(exc))
            return False
        try:
            granted = await self._registrar.ask(token)
        except RegistrationRefused as exc:
            self._refused.add(token.value)
            log.error("registration refused", reason=str(exc), next_step="this token is not tried again")
            return False
        except (RegistrationTimedOut, LocalStateError) as exc:
            log.error("registration failed", reason=str(exc), next_step="tried again with the next probe")
            return False
        # the token is spent: a stop signal must not lose what it bought
        return await to_its_end(self._install(granted))

    async def _install(self, granted: Granted) -> bool:
        async with self._paused():
            async with self._writing:
                try:
                    await self._registrar.tell(granted)
                    await asyncio.to_thread(self._registrar.replace, granted)
                except OSError as exc:
                    log.error(
                        "new identity not saved",
                        node_id=granted.identity.node_id,
                        error=str(exc),
                        next_step="repair the data directory; the token may be used up",
                    )
                    return False
                self._tokens.forget(granted.token)
                self._node.renew(granted.identity, granted.desired, 0.0)
            await self._converge()
        return True

    async def _become(self, found: Identity) -> None:
        held = self._node.identity
        register_secret(found.node_key.get_secret_value())
        if found.private_key is not None:
            register_secret(found.private_key.reveal())
        async with self._paused():
            async with self._writing:
                if found.node_id == held.node_id:
                    desired, fetched_at = self._node.desired, self._node.fetched_at
                    found = replace(found, private_key=found.private_key or held.private_key)
                else:
                    desired, fetched_at = await asyncio.to_thread(self._cached, found.node_id)
                self._node.renew(found, desired, fetched_at)
            await self._converge()

    def _cached(self, node_id: str) -> tuple[Desired, float]:
        cached = self._snapshots.load(node_id)
        return replace(cached.desired, signing_keys=self._identities.load_signing_keys()), cached.fetched_at

    def _complain(self, reason: str) -> None:
        """Once, then every ten minutes, or when it is something else."""
        now = asyncio.get_running_loop().time()
        if reason != self._complaint or now - self._complained_at >= REPEAT_ERROR_SECONDS:
            self._complaint, self._complained_at = reason, now
            log.error(
                "no new identity", reason=reason, next_step="heartbeats find out whether the old one counts again"
            )


def _names(identity: Identity) -> tuple[str, bytes, SecretStr]:
    return identity.node_id, identity.mesh_ip, identity.node_key
