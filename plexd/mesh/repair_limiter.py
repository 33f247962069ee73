"""The guard against fights: what another program keeps undoing is repaired ever more seldom (mesh contract, 5.1).

An object repaired more than 10 times in a minute is left alone for a second, and after each further repair twice as
long, up to a minute. A minute without damage ends it. The state is a value; time is an argument, in seconds of any
clock that is never set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from plexd.mesh.changes import (
    AddAddress,
    AddRoute,
    Change,
    CreateLink,
    DeleteLink,
    PutPeer,
    RemoveAddress,
    RemovePeer,
    RemoveRoute,
    RemoveTable,
    RenewSessions,
    ReplaceTable,
    SetAlias,
    SetDevice,
    SetDown,
    SetMtu,
    SetUp,
    Subject,
)
from plexd.mesh.drift import Correction
from plexd.mesh.observed import Route

_CAUSES = (ReplaceTable, CreateLink, DeleteLink, SetDevice, SetUp, AddAddress, SetMtu)  # others may lean on these

REPAIRS_A_MINUTE = 10  # that are nothing special
MINUTE = 60.0
FIRST_REST_SECONDS, LONGEST_REST_SECONDS = 1.0, 60.0


class Struggle(NamedTuple):
    """What is known of one object: when it was repaired in the last minute, and when damage to it was last seen.

    `rest` is how long it is left alone after a repair, 0 while nobody fights over it; of a contested object `repairs`
    are those that made it one. `is_open` says that damage was seen and left.
    """

    repairs: tuple[float, ...] = ()
    seen: float = 0.0
    rest: float = 0.0
    not_before: float = 0.0
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class RepairLimiter:
    struggles: Mapping[str, Struggle] = field(default_factory=dict)

    @property
    def flapping(self) -> tuple[str, ...]:
        """Each contested object with the number of its repairs, as it is reported."""
        return tuple(
            f"{name}: {len(struggle.repairs)} repairs in {MINUTE:.0f} s"
            for name, struggle in self.struggles.items()
            if struggle.rest
        )

    @property
    def leaves_damage(self) -> bool:
        """Whether damage to a contested object was seen and left; a look that leaves it out would take it for gone."""
        return any(struggle.is_open and struggle.rest for struggle in self.struggles.values())

    @property
    def due(self) -> float | None:
        """When the next object may be repaired again, or may turn out to be left in peace; None without a fight."""
        times = [
            struggle.not_before if struggle.is_open else struggle.seen + MINUTE
            for struggle in self.struggles.values()
            if struggle.rest
        ]
        return min(times, default=None)

    def admit(
        self, subject: Subject, repairs: Sequence[Change], now: float
    ) -> tuple[RepairLimiter, tuple[Change, ...]]:
        """What a look found, with those of `repairs` that may be made: not what is left alone nor what leans on it."""
        damaged = {_object(subject, change) for change in repairs}
        struggles = {}
        for name, struggle in self.struggles.items():
            if name in damaged or struggle.is_open:  # what was left broken was so until now
                struggles[name] = struggle._replace(seen=now, is_open=name in damaged)
            elif now - struggle.seen < MINUTE:
                struggles[name] = struggle
        for name in damaged & struggles.keys():
            if self._is_over(name, now):
                del struggles[name]
        resting = {name for name in damaged & struggles.keys() if struggles[name].not_before > now}
        left = tuple(change for change in repairs if _object(subject, change) not in resting)
        causes = [change for change in repairs if isinstance(change, _CAUSES) and _object(subject, change) in resting]
        for cause in causes:  # which grow: what leans on one may be one itself
            causes += [change for change in left if isinstance(change, _CAUSES) and _leans_on(change, cause)]
            left = tuple(change for change in left if not _leans_on(change, cause))
        return RepairLimiter(struggles), left

    def _is_over(self, name: str, now: float) -> bool:
        """Whether this damage comes after a minute without any."""
        struggle = self.struggles[name]
        return not struggle.is_open and now - struggle.seen >= MINUTE

    def record(self, subject: Subject, done: Iterable[Change], now: float) -> RepairLimiter:
        """After these repairs. One that merely followed from another, like the routes of a link set up again, is none
        of its own."""
        done = tuple(done)
        causes = [change for change in done if isinstance(change, _CAUSES)]
        struggles = dict(self.struggles)
        for change in done:
            if isinstance(change, SetDown) or any(_leans_on(change, cause) for cause in causes):
                continue  # taking the interface down is a measure of ours
            name = _object(subject, change)
            known = self.struggles.get(name, Struggle())
            if known.rest:
                repairs, rest = known.repairs, min(2 * known.rest, LONGEST_REST_SECONDS)
            else:
                repairs = (*(at for at in known.repairs if now - at < MINUTE), now)
                rest = FIRST_REST_SECONDS if len(repairs) > REPAIRS_A_MINUTE else 0.0
            struggles[name] = Struggle(repairs, now, rest, now + rest, is_open=False)
        return RepairLimiter(struggles)


def shut(due: Sequence[Change], admitted: Sequence[Change], *, is_up: bool) -> tuple[Change, ...]:
    """`admitted`, and the interface taken down where the firewall is `due` and left alone: nothing may pass it then."""
    if not leaves_firewall(due, admitted) or not is_up:
        return tuple(admitted)
    return (SetDown(), *admitted)


def leaves_firewall(due: Sequence[Change], admitted: Sequence[Change]) -> bool:
    """Whether a firewall that is not what it should be stays so."""
    return any(isinstance(change, ReplaceTable) and change not in admitted for change in due)


def flapping_correction(before: RepairLimiter, after: RepairLimiter) -> tuple[Correction, ...]:
    """One correction when a fight has begun, however many objects it is about."""
    known = {name for name, struggle in before.struggles.items() if struggle.rest}
    new = [text for text in after.flapping if text.rpartition(": ")[0] not in known]
    if not new:
        return ()
    more = f", and {len(new) - 1} more" if len(new) > 1 else ""
    return (Correction("repair_contested", new[0] + more),)


def _object(subject: Subject, change: Change) -> str:
    """What the change repairs, by kind and name."""
    match change:
        case ReplaceTable() | RemoveTable():
            return f"table {subject.table}"
        case CreateLink() | DeleteLink():
            return f"link {subject.interface}"
        case SetAlias():
            return f"alias of {subject.interface}"
        case SetDevice():
            return f"{' and '.join(change.fields)} of {subject.interface}"
        case RenewSessions():
            return f"sessions of {subject.interface}"
        case SetMtu():
            return f"mtu of {subject.interface}"
        case SetUp() | SetDown():
            return f"up state of {subject.interface}"
        case AddAddress(address) | RemoveAddress(address):
            return f"address {address}"
        case AddRoute(route) | RemoveRoute(route):
            return f"route {route.prefix}"
        case PutPeer(peer_id, public_key) | RemovePeer(peer_id, public_key):
            return f"peer {peer_id}" if peer_id else f"peer key {public_key.short}"


def _leans_on(change: Change, other: Change) -> bool:
    """Whether `change` follows from what made `other` necessary, and cannot be without it."""
    match other:
        case ReplaceTable():  # nothing may pass that it has not judged
            return isinstance(change, CreateLink | SetUp) or (isinstance(change, PutPeer) and change.is_new)
        case CreateLink() | DeleteLink():
            return not isinstance(change, CreateLink | DeleteLink)
        case SetUp():
            return isinstance(change, AddRoute) or _is_ipv6(change)
        case SetDevice():
            return isinstance(change, RenewSessions)
        case SetMtu():
            return _is_ipv6(change)  # below 1280 there is none on a link
        case AddAddress(address):
            return isinstance(change, AddRoute) and change.route.source == address.packed
        case _:
            return False


def _is_ipv6(change: Change) -> bool:
    match change:
        case AddAddress(prefix) | AddRoute(Route(prefix)):
            return len(prefix.packed) == 16
        case _:
            return False
