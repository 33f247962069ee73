"""What a pipeline does about a request that failed (docs/contract/telemetry.md §2.5). Pure."""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

from plexd.errors import Conflict, ControlError, Forbidden, NotFound, Rejected, TooLarge, Unauthenticated

FORBIDDEN_SECONDS = 300.0
UNPROVISIONED_SECONDS = 900.0
REFUSED_SECONDS = 10.0  # a heartbeat finds out meanwhile whether the identity is refused
UNSUPPORTED_MEDIA = 415  # the uncompressed repetition was refused too


class NextDelivery(Enum):
    """What the batch needs next."""

    DIVIDE = auto()
    HALVE = auto()
    RETRY = auto()  # the same request, after the backoff
    PAUSE = auto()
    IDENTITY = auto()  # the node's key is refused: wait for a credential that is not
    UNPROVISIONED = auto()  # the control plane lacks the endpoint


class Reaction(NamedTuple):
    """`seconds` to wait at least, unless the answer names another wait; for IDENTITY never less than the backoff."""

    answer: NextDelivery
    seconds: float = 0.0


def react(error: ControlError) -> Reaction:
    match error:
        case Unauthenticated():
            return Reaction(NextDelivery.IDENTITY, REFUSED_SECONDS)
        case Forbidden():
            return Reaction(NextDelivery.PAUSE, FORBIDDEN_SECONDS)
        case NotFound():
            if error.status in {405, 501}:
                return Reaction(NextDelivery.UNPROVISIONED, UNPROVISIONED_SECONDS)
            return Reaction(NextDelivery.PAUSE, FORBIDDEN_SECONDS)
        case TooLarge():
            return Reaction(NextDelivery.HALVE)
        case Rejected() if error.status == UNSUPPORTED_MEDIA:
            return Reaction(NextDelivery.RETRY)
        case Rejected() | Conflict():
            return Reaction(NextDelivery.DIVIDE)
        case _:
            return Reaction(NextDelivery.RETRY)
