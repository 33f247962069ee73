"""Faults an operator injects: which requests they meet, how often, and what becomes of the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

RESPONSE_LIMIT = 10 * 1024 * 1024  # what an agent reads of an answer (docs/contract/wire.md §2)
BOMB_BYTES = 256 * 1024 * 1024


class Effect(StrEnum):
    """The first two stand in for the control plane, which never sees the request; the others spoil its answer."""

    STATUS = "status"  # `status` with `body` and `headers`
    BODY = "body"  # 200 with exactly `body`

    NONE = "none"  # the honest answer, for a fault that only delays
    TRUNCATE = "truncate"  # half the body under a Content-Length that fits, so the JSON breaks off
    CUT = "cut"  # half the body under the Content-Length of the whole, then the connection closes
    DISCONNECT = "disconnect"  # no byte of an answer, the connection is reset
    END = "end"  # the head and nothing else: a stream that closes at once, an empty body elsewhere
    OVERSIZED = "oversized"  # the answer, filled with white space up to `size` bytes (10 MiB + 1)
    GZIP_BOMB = "gzip_bomb"  # the same, compressed: small on the wire, `size` bytes after decoding (256 MiB)


_NOT_ON_STREAMS = {Effect.TRUNCATE, Effect.OVERSIZED, Effect.GZIP_BOMB}


class Fault(BaseModel):
    """`endpoint` and `node_id` None mean any; `count` None means until cleared.

    `contains` and `larger_than` (bytes) narrow it to requests with such a body, after decompression.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint: str | None = None
    node_id: str | None = None
    contains: str | None = None
    larger_than: NonNegativeInt | None = None
    count: PositiveInt | None = 1
    delay_seconds: NonNegativeFloat = 0.0  # between the request and whatever follows
    effect: Effect = Effect.NONE
    status: Annotated[int, Field(ge=200, le=599)] = 500
    headers: dict[str, str] = {}
    body: str = ""
    size: PositiveInt | None = None

    @property
    def replaces_the_control_plane(self) -> bool:
        return self.effect in {Effect.STATUS, Effect.BODY}

    def meets(self, endpoint: str, node_id: str | None, text: Callable[[], bytes]) -> bool:
        """`text` gives the body."""
        return (
            self.endpoint in {None, endpoint}
            and self.node_id in {None, node_id}
            and not (endpoint == "events" and self.effect in _NOT_ON_STREAMS)
            and (self.contains is None or self.contains.encode() in text())
            and (self.larger_than is None or len(text()) > self.larger_than)
        )


class FaultPlan:
    """Faults in the order of their injection; the first that fits is used until its count is spent."""

    def __init__(self) -> None:
        self._faults: list[tuple[Fault, int | None]] = []

    @property
    def pending(self) -> Sequence[Fault]:
        """What is still to come, with what is left of each count."""
        return [fault.model_copy(update={"count": left}) for fault, left in self._faults]

    def inject(self, fault: Fault) -> None:
        self._faults.append((fault, fault.count))

    def clear(self) -> None:
        self._faults.clear()

    def take(self, endpoint: str, node_id: str | None, text: Callable[[], bytes]) -> Fault | None:
        """The fault this request meets, its count reduced; `text` gives the body."""
        for index, (fault, left) in enumerate(self._faults):
            if fault.meets(endpoint, node_id, text):
                if left == 1:
                    del self._faults[index]
                elif left is not None:
                    self._faults[index] = (fault, left - 1)
                return fault
        return None
