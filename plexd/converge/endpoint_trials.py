"""Which peers use another endpoint candidate than their newest one, and which endpoints have not had their time yet.

Plain state without I/O. Times are in the seconds of the event loop's clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import takewhile

from plexd.mesh.desired import Candidates

TRIAL_SECONDS = 30.0  # what an endpoint gets before another candidate is tried


class EndpointTrials:
    def __init__(self) -> None:
        self._overridden: dict[str, tuple[Candidates, str]] = {}  # the endpoint in use, and the candidates at that time
        self._set_at: dict[str, float] = {}  # by peer id; the latest last
        self._since = 0.0  # start of the trial of endpoints that were there before

    def overridden(self, candidates: Mapping[str, Candidates]) -> dict[str, str]:
        """Endpoint texts in use instead of the newest candidate, by peer id. New candidates of a peer end the
        override."""
        self._overridden = {i: known for i, known in self._overridden.items() if candidates.get(i) == known[0]}
        return {peer_id: text for peer_id, (_, text) in self._overridden.items()}

    def override(self, moves: Mapping[str, str], candidates: Mapping[str, Candidates]) -> None:
        """Use these endpoint texts, by peer id, until a peer's candidates change."""
        self._overridden |= {peer_id: (candidates[peer_id], text) for peer_id, text in moves.items()}

    def restart(self, now: float) -> None:
        """Give every peer's endpoint the time of a new one.

        After a gap in time the age of a handshake does not tell whether the peer still answers, and the keepalive,
        which would make a new handshake, has had no turn.
        """
        self._since = now

    def note(self, peer_ids: Iterable[str], now: float) -> None:
        """The endpoints of these peers were set."""
        self._forget_old(now)  # here too: `on_trial` may never be asked
        for peer_id in peer_ids:
            self._set_at.pop(peer_id, None)  # or the peer would keep its former place in the order
            self._set_at[peer_id] = now

    def on_trial(self, peer_ids: Collection[str], now: float) -> frozenset[str]:
        """The peers, of all `peer_ids`, whose endpoint may still work out."""
        if self._since > now - TRIAL_SECONDS:
            return frozenset(peer_ids)
        self._forget_old(now)
        return frozenset(self._set_at)

    def _forget_old(self, now: float) -> None:
        before = now - TRIAL_SECONDS
        for peer_id in list(takewhile(lambda i: self._set_at[i] <= before, self._set_at)):
            del self._set_at[peer_id]
