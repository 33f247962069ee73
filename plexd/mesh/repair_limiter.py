"""Limits the repairs of flapping objects, which another program keeps damaging (docs/contract/mesh.md §5.1).

An object that was repaired more than 10 times in a minute rests for a second, and after each further repair twice as
long, up to a minute. A minute without damage ends that. The state is a value; time is an argument, in seconds of a
monotonic clock.
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

_CAUSES = (ReplaceTable, CreateLink, DeleteLink, SetDevice, SetUp, AddAddress, SetMtu)  # changes that others depend on

REPAIRS_A_MINUTE = 10  # without being taken for flapping
MINUTE = 60.0
FIRST_REST_SECONDS, LONGEST_REST_SECONDS = 1.0, 60.0


class History(NamedTuple):
    """The history of one object: its repairs in the last minute, and when damage was last seen.

    `rest` is how long the object is left alone after a repair, 0 unless it is flapping. The `repairs` of a flapping
    object are those that made it one. `is_open` says that damage was seen and not repaired.
    """

    repairs: tuple[float, ...] = ()
    seen: float = 0.0
    rest: float = 0.0
    not_before: float = 0.0
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class RepairLimiter:
    histories: Mapping[str, History] = field(default_factory=dict)

    @property
    def flapping(self) -> tuple[str, ...]:
        """Each flapping object with the number of its repairs, as health reports it."""
        return tuple(
            f"{name}: {len(history.repairs)} repairs in {MINUTE:.0f} s"
            for name, history in self.histories.items()
            if history.rest
        )

    @property
    def leaves_damage(self) -> bool:
        """Whether damage to a flapping object is left unrepaired. A look that leaves the object out would miss that."""
        return any(history.is_open and history.rest for history in self.histories.values())

    @property
    def due(self) -> float | None:
        """When the next flapping object may be repaired, or may cease to be flapping; None without any."""
        times = [
            history.not_before if history.is_open else history.seen + MINUTE
            for history in self.histories.values()
            if history.rest
        ]
        return min(times, default=None)

    def admit(
        self, subject: Subject, repairs: Sequence[Change], now: float
    ) -> tuple[RepairLimiter, tuple[Change, ...]]:
        """The new state, and the `repairs` that may be made now: none of a resting object, none that depends on one."""
        damaged = {_object(subject, change) for change in repairs}
        histories = {}
        for name, history in self.histories.items():
            if name in damaged or history.is_open:  # what was left broken was so until now
                histories[name] = history._replace(seen=now, is_open=name in damaged)
            elif now - history.seen < MINUTE:
                histories[name] = history
        for name in damaged & histories.keys():
            if self._is_over(name, now):
                del histories[name]
        resting = {name for name in damaged & histories.keys() if histories[name].not_before > now}
        left = tuple(change for change in repairs if _object(subject, change) not in resting)
        causes = [change for change in repairs if isinstance(change, _CAUSES) and _object(subject, change) in resting]
        for cause in causes:  # the list grows: a dependent change may be a cause itself
            causes += [change for change in left if isinstance(change, _CAUSES) and _depends_on(change, cause)]
            left = tuple(change for change in left if not _depends_on(change, cause))
        return RepairLimiter(histories), left

    def _is_over(self, name: str, now: float) -> bool:
        """Whether this damage comes after a minute without any."""
        history = self.histories[name]
        return not history.is_open and now - history.seen >= MINUTE

    def record(self, subject: Subject, done: Iterable[Change], now: float) -> RepairLimiter:
        """The state after these repairs. A repair that only follows from another one, as routes follow from a link that
        was set up again, does not count."""
        done = tuple(done)
        causes = [change for change in done if isinstance(change, _CAUSES)]
        histories = dict(self.histories)
        for change in done:
            if isinstance(change, SetDown) or any(_depends_on(change, cause) for cause in causes):
                continue  # plexd itself took the interface down
            name = _object(subject, change)
            known = self.histories.get(name, History())
            if known.rest:
                repairs, rest = known.repairs, min(2 * known.rest, LONGEST_REST_SECONDS)
            else:
                repairs = (*(at for at in known.repairs if now - at < MINUTE), now)
                rest = FIRST_REST_SECONDS if len(repairs) > REPAIRS_A_MINUTE else 0.0
            histories[name] = History(repairs, now, rest, now + rest, is_open=False)
        return RepairLimiter(histories)


def shut(due: Sequence[Change], admitted: Sequence[Change], *, is_up: bool) -> tuple[Change, ...]:
    """`admitted`, and the interface taken down where the table is due and not admitted: nothing may pass then."""
    if not leaves_table(due, admitted) or not is_up:
        return tuple(admitted)
    return (SetDown(), *admitted)


def leaves_table(due: Sequence[Change], admitted: Sequence[Change]) -> bool:
    """Whether a table that differs from the wanted one stays as it is."""
    return any(isinstance(change, ReplaceTable) and change not in admitted for change in due)


def flapping_correction(before: RepairLimiter, after: RepairLimiter) -> tuple[Correction, ...]:
    """One correction when objects have begun to flap, however many they are."""
    known = {name for name, history in before.histories.items() if history.rest}
    new = [text for text in after.flapping if text.rpartition(": ")[0] not in known]
    if not new:
        return ()
    more = f", and {len(new) - 1} more" if len(new) > 1 else ""
    return (Correction("repair_contested", new[0] + more),)


def _object(subject: Subject, change: Change) -> str:
    """The object that the change repairs, by kind and name."""
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


def _depends_on(change: Change, other: Change) -> bool:
    """Whether `change` follows from the damage behind `other`, and cannot be made without `other`."""
    match other:
        case ReplaceTable():  # no packet may pass that the table has not judged
            return isinstance(change, CreateLink | SetUp) or (isinstance(change, PutPeer) and change.is_new)
        case CreateLink() | DeleteLink():
            return not isinstance(change, CreateLink | DeleteLink)
        case SetUp():
            return isinstance(change, AddRoute) or _is_ipv6(change)
        case SetDevice():
            return isinstance(change, RenewSessions)
        case SetMtu():
            return _is_ipv6(change)  # a link with an MTU below 1280 has no IPv6
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
