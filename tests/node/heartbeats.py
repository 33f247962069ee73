"""Heartbeats for hours on end, with the recovery beside them, as a control plane sees them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pydantic import SecretStr

from plexd.errors import NotFound, Transient, Unauthenticated
from plexd.identity.recovery import Recovery
from plexd.node.health import Condition, Health
from plexd.node.heartbeat import Heartbeat
from plexd.node.state import Node
from tests.node_harness import FOREVER, Asked, make_node, middle
from tests.virtual_time import run_virtual

REFUSED = Unauthenticated("401", status=401)
UNKNOWN = NotFound("404", status=404)
GONE = Transient("gone")


@dataclass(frozen=True)
class Hints:
    reconcile: bool = False
    rotate_keys: bool = False


@dataclass
class Renewals:
    """Another identity from the moments on that are given, each once; when it was looked for, in which way."""

    node: Node
    on_disk_at: float = FOREVER
    token_at: float = FOREVER
    adoptions: list[float] = field(default_factory=list)
    registrations: list[float] = field(default_factory=list)

    async def adopt(self) -> bool:
        self.adoptions.append(asyncio.get_running_loop().time())
        if self.adoptions[-1] < self.on_disk_at:
            return False
        self.on_disk_at = FOREVER
        return self._renewed()

    async def register(self) -> bool:
        self.registrations.append(asyncio.get_running_loop().time())
        if self.registrations[-1] < self.token_at:
            return False
        self.token_at = FOREVER
        return self._renewed()

    def _renewed(self) -> bool:
        identity = replace(self.node.identity, node_key=SecretStr(f"{self.node.credential().get_secret_value()}+"))
        self.node.renew(identity, self.node.desired, 0.0)
        return True


@dataclass
class Beats:
    """Heartbeat n (from 1) takes `takes` seconds and is answered with `script(n)`."""

    script: Callable[[int], Hints | Exception] = lambda _: Hints()
    takes: float = 0.0
    uniform: Callable[[float, float], float] = middle
    interval: float = 30.0
    times: list[float] = field(default_factory=list)
    limits: set[float] = field(default_factory=set)
    running: int = 0
    reconcile: Asked = field(default_factory=Asked)
    rotation: Asked = field(default_factory=Asked)

    def __post_init__(self) -> None:
        self.health = Health()
        self.node: Node = make_node(health=self.health)
        self.renewal = Renewals(self.node)
        self.heartbeat = Heartbeat(self.beat, self.node, self.interval, self.reconcile, self.rotation, self.uniform)
        self.recovery = Recovery(self.node, self.renewal, self.heartbeat.probe, self.interval, self.uniform)

    async def beat(self, limit_seconds: float) -> Hints:
        self.times.append(round(asyncio.get_running_loop().time(), 3))
        self.limits.add(limit_seconds)
        number = len(self.times)
        self.running += 1
        assert self.running == 1, "heartbeats pile up"
        await asyncio.sleep(self.takes)
        self.running -= 1
        answer = self.script(number)
        if isinstance(answer, Exception):
            if answer is REFUSED:
                self.node.suspect(self.node.credential())  # as the client does
            raise answer
        return answer

    async def run(self, seconds: float, *meanwhile: tuple[float, Callable[[], object]]) -> None:
        """`meanwhile` are calls and when they are made."""
        loop = asyncio.get_running_loop()
        tasks = {asyncio.create_task(service.run()) for service in (self.heartbeat, self.recovery)}
        for when, call in meanwhile:
            loop.call_at(when, call)
        await asyncio.sleep(seconds)
        for task in tasks:
            assert not task.done(), task
            task.cancel()
        await asyncio.wait(tasks)

    @property
    def is_refused(self) -> bool:
        return any(finding.condition is Condition.IDENTITY_REFUSED for finding in self.health.findings())

    def suspect(self) -> None:
        self.node.suspect(self.node.credential())


def beats(seconds: float, script: Callable[[int], Hints | Exception], **options: object) -> Beats:
    async def main() -> Beats:
        watched = Beats(script, **options)  # type: ignore[arg-type]
        await watched.run(seconds)
        return watched

    return run_virtual(main())


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]
