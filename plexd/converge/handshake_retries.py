"""Which peers ought to shake hands, and how long they have been waited for. Plain state without I/O."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Mapping, Sequence

from plexd.mesh.changes import Outcome, RenewSessions, SetDevice
from plexd.mesh.handshakes import Awaited, awaited_anew, awaited_new, next_round
from plexd.mesh.keys import PrivateKey
from plexd.mesh.target import Target


class HandshakeRetries:
    """`awaiting` is set while peers ought to shake hands."""

    def __init__(self) -> None:
        self.awaiting = asyncio.Event()
        self._awaited: dict[str, Awaited] = {}
        self._renewed_under: PrivateKey | None = None  # the key whose arrival ended sessions last

    def note(self, outcomes: Sequence[Outcome], target: Target, begun: float) -> None:
        """Wait for the peers that these changes, applied from `begun` on (Unix seconds), leave without a session."""
        done = [outcome.change for outcome in outcomes if outcome.error is None]
        awaited = awaited_new(done, target)
        key = target.settings.private_key
        # the same key set once more, as after a failure beside it, ends no session
        if key != self._renewed_under and any(isinstance(change, SetDevice) for change in done):
            for change in done:
                if isinstance(change, RenewSessions):
                    awaited |= awaited_anew(change.public_keys, target, begun)
                    self._renewed_under = key
        if awaited:
            self._awaited |= awaited
            self.awaiting.set()

    def next_round(self) -> Mapping[str, Awaited]:
        """Count a round for every peer; the peers to look at in this round."""
        self._awaited, due = next_round(self._awaited)
        if not self._awaited:
            self.awaiting.clear()
        return due

    def settle(self, looked_at: Container[str], left: Mapping[str, Awaited]) -> None:
        """After a look at some of the peers: go on waiting for those that are `left`."""
        for peer_id in [peer_id for peer_id in self._awaited if peer_id in looked_at]:
            if peer_id in left:
                self._awaited[peer_id] = left[peer_id]
            else:
                del self._awaited[peer_id]
