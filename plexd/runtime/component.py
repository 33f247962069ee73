"""A component of the daemon: one feature, with everything that the composition has to know of the feature.

The composition goes over the components and knows none of their parts. A new feature is a package with an `assembly.py`
that returns a Component.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from plexd.runtime.supervisor import Service


class Envelope(Protocol):
    """What came with an event; `wire.envelope.Envelope` is the real one. `issued` is in microseconds, Unix time."""

    @property
    def event_type(self) -> str: ...

    @property
    def event_id(self) -> str: ...

    @property
    def issued(self) -> int | None: ...


EventHandler = Callable[[Any, Envelope], Awaitable[None]]
KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class Component:
    """Everything is optional.

    `services` run while the node works; they pause while its identity changes, and end first at a stop. `live` has the
    keys or sections of the configuration that the component takes up without a restart, with what to call then.
    `events` has the handler of an event by the type of its value (`plexd.mesh.events`). `stream_connected` is called
    whenever the event stream has connected.

    `status`, `heartbeat` and `capabilities` add members to the documents of that name, each built when the document is:
    `status` a JSON value, the other two what the wire model of the member takes.
    """

    services: Sequence[Service] = ()
    live: Mapping[str, Callable[[], None]] = field(default_factory=dict)
    events: Mapping[type[Any], EventHandler] = field(default_factory=dict)
    stream_connected: Sequence[Callable[[], None]] = ()
    status: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    heartbeat: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    capabilities: Mapping[str, Callable[[], object]] = field(default_factory=dict)


def contribute(table: dict[KeyT, ValueT], entries: Mapping[KeyT, ValueT]) -> None:
    """Add what a component gives to a table of the composition. Raises ValueError for a key that is taken."""
    if taken := table.keys() & entries.keys():
        raise ValueError(f"given twice: {', '.join(sorted(map(str, taken)))}")
    table.update(entries)
