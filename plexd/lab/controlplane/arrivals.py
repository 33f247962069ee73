"""What reached the control plane, kept for whoever asks what an agent sent. Credentials never get in here."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

KEPT = 20_000
KEPT_BYTES = 64 * 1024 * 1024  # of bodies, so that telemetry can't fill the memory

Credential = Literal["bootstrap_token", "node_key", "unknown", "none"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. `status` is None when no whole answer was given."""

    number: int  # counts all arrivals from 1
    time: float  # Unix seconds at which the request was complete
    endpoint: str  # name in the table of endpoints, "" for a path that is none
    node_id: str | None  # as authenticated; for a registration, as assigned
    method: str
    path: str
    headers: Mapping[str, str]  # lower-case names, without `authorization`
    credential: Credential
    text: bytes  # the body after decompression, a bootstrap token masked
    size: int  # bytes of the body on the wire
    status: int | None
    error: str | None  # the reason of a refusal
    fault: str | None  # the effect of the fault it met

    @property
    def body(self) -> Any:
        """The body as Python's json reads it; None without one, and for one that is not JSON."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError):
            return None

    def as_json(self) -> dict[str, Any]:
        members = asdict(self)
        del members["text"]
        return members | {"body": self.body}


Predicate = Callable[[Arrival], bool]


class Arrivals:
    def __init__(self) -> None:
        self._kept: deque[Arrival] = deque()
        self._bytes = 0
        self._count = 0
        self._changed = asyncio.Condition()

    @property
    def count(self) -> int:
        """The number of the newest arrival."""
        return self._count

    def next_number(self) -> int:
        self._count += 1
        return self._count

    async def add(self, arrival: Arrival) -> None:
        self._kept.append(arrival)
        self._bytes += len(arrival.text)
        while len(self._kept) > KEPT or (self._bytes > KEPT_BYTES and len(self._kept) > 1):
            self._bytes -= len(self._kept.popleft().text)
        async with self._changed:
            self._changed.notify_all()

    def matching(
        self,
        endpoint: str | None = None,
        node_id: str | None = None,
        *,
        after: int = 0,
        where: Predicate | None = None,
    ) -> Sequence[Arrival]:
        """Those still kept, oldest first; `after` is the number of an earlier arrival."""
        return [
            arrival
            for arrival in self._kept
            if arrival.number > after
            and endpoint in {None, arrival.endpoint}
            and node_id in {None, arrival.node_id}
            and (where is None or where(arrival))
        ]

    async def wait_for(
        self,
        endpoint: str | None = None,
        node_id: str | None = None,
        *,
        count: int = 1,
        after: int = 0,
        where: Predicate | None = None,
        timeout: float = 10.0,
    ) -> Sequence[Arrival]:
        """The first `count` that match, as soon as they are there. TimeoutError, saying what came instead."""
        try:
            async with asyncio.timeout(timeout), self._changed:
                while len(found := self.matching(endpoint, node_id, after=after, where=where)) < count:
                    await self._changed.wait()
                return found[:count]
        except TimeoutError:
            came = [f"{a.endpoint}:{a.status}" for a in self.matching(after=after)]
            raise TimeoutError(
                f"{len(self.matching(endpoint, node_id, after=after, where=where))} of {count} requests to"
                f" {endpoint or 'any endpoint'} came within {timeout} s; all that came: {came[-20:]}"
            ) from None
