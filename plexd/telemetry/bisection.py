"""How a batch gets through a control plane that refuses it: halved, divided until the culprit stands alone, given up.

Told what became of each request, it says what to send next and what is decided, in order (docs/contract/telemetry.md
§2.5 and §2.6). Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from plexd.telemetry.window import Entry, batch_size

DIVISION_REQUESTS = 32  # for one batch, once an entry of it has been refused
SMALLEST_LIMIT = 64 << 10


class EntryOutcome(StrEnum):
    """What became of an entry; but for SENT the value is the reason it is counted under."""

    SENT = "sent"
    REJECTED = "rejected"
    OVERSIZE = "oversize"
    QUARANTINED = "quarantined"


class Settled(NamedTuple):
    entry: Entry
    fate: EntryOutcome


class Bisection:
    """`shorten` cuts the text of an entry down so that it may pass; whether there was something to cut.

    `byte_limit` is what the endpoint is known to take; it goes down when a request is too large.
    """

    def __init__(self, entries: list[Entry], byte_limit: int, shorten: Callable[[Entry], bool]) -> None:
        self.byte_limit = byte_limit
        self._parts = [entries]  # the next one last
        self._alone = len(entries) == 1
        self._shorten = shorten
        self._shortened: Entry | None = None
        self._undecided: list[tuple[Entry, EntryOutcome | None]] = []  # refused before anything was accepted
        self._accepted = False
        self._requests: int | None = None  # counted from the first refusal on

    @property
    def is_over(self) -> bool:
        return not self._parts

    def next(self) -> list[Entry]:
        """What to send now; not to be asked when it is over."""
        part = self._parts.pop()
        while len(part) > 1 and batch_size(part) > self.byte_limit:
            fitting = _fitting(part, self.byte_limit)
            self._parts.append(part[fitting:])
            part = part[:fitting]
        self._parts.append(part)
        return part

    def accepted(self) -> list[Settled]:
        """The control plane took what `next` gave."""
        self._count()
        settled = [Settled(entry, fate or EntryOutcome.REJECTED) for entry, fate in self._undecided]
        settled += [Settled(entry, EntryOutcome.SENT) for entry in self._parts.pop()]
        self._undecided.clear()
        self._accepted = True
        return settled + self._give_up()

    def refused(self) -> list[Settled]:
        """The control plane said that it will never take this."""
        self._requests = self._requests or 0
        self._count()
        part = self._parts.pop()
        if len(part) > 1:
            self._split(part)
            return self._give_up()
        return self._decide(part[0], EntryOutcome.REJECTED if self._alone else None)

    def too_large(self) -> list[Settled]:
        """The control plane takes only smaller requests."""
        self._count()
        part = self._parts.pop()
        if len(part) > 1:
            self.byte_limit = max(SMALLEST_LIMIT, batch_size(part) // 2)
            self._split(part)
            return self._give_up()
        entry = part[0]
        if entry is self._shortened or not self._shorten(entry):
            return self._decide(entry, EntryOutcome.OVERSIZE)
        self._shortened = entry
        self._parts.append([entry])
        return self._give_up()

    def abandon(self) -> list[Entry]:
        """Everything that has not been settled, in order; it is over then."""
        left = [entry for entry, _ in self._undecided] + [entry for part in reversed(self._parts) for entry in part]
        self._undecided.clear()
        self._parts.clear()
        return left

    def _count(self) -> None:
        if self._requests is not None:
            self._requests += 1

    def _split(self, part: list[Entry]) -> None:
        middle = len(part) // 2
        self._parts += [part[middle:], part[:middle]]

    def _decide(self, entry: Entry, fate: EntryOutcome | None) -> list[Settled]:
        """`fate` None: rejected if anything of the batch is accepted, quarantined with the rest if nothing is."""
        if self._accepted:
            return [Settled(entry, fate or EntryOutcome.REJECTED), *self._give_up()]
        self._undecided.append((entry, fate))
        return self._give_up()

    def _give_up(self) -> list[Settled]:
        """The rest, once nothing remains to be tried or the requests are used up."""
        if self._parts and (self._requests or 0) < DIVISION_REQUESTS:
            return []
        rest = [Settled(entry, fate or EntryOutcome.QUARANTINED) for entry, fate in self._undecided]
        rest += [Settled(entry, EntryOutcome.QUARANTINED) for part in reversed(self._parts) for entry in part]
        self._undecided.clear()
        self._parts.clear()
        return rest


def _fitting(part: list[Entry], limit: int) -> int:
    """How many of the first entries make a batch within `limit`, at least one."""
    size = batch_size([])
    for index, entry in enumerate(part):
        size += len(entry.body) + 1
        if size > limit:
            return max(1, index)
    return len(part)
