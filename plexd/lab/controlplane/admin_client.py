"""What an operator, or a test, does with the control plane: change it, speak on the streams, break it, look at it.

Nodes are named by id or by host name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import JsonValue

from plexd.lab.controlplane.application import Application
from plexd.lab.controlplane.arrivals import Arrival, Arrivals, Predicate
from plexd.lab.controlplane.faults import Fault, FaultPlan
from plexd.lab.controlplane.fleet import Fleet, Node, Signer
from plexd.lab.controlplane.listener import Listener
from plexd.lab.controlplane.telemetry import Entry, follow, gaps


class Admin:
    """`fleet` may be used directly as well; it is the same object the nodes talk to."""

    def __init__(
        self, fleet: Fleet, application: Application, arrivals: Arrivals, faults: FaultPlan, listener: Listener
    ) -> None:
        self.fleet = fleet
        self.arrivals = arrivals
        self._application = application
        self._faults = faults
        self._listener = listener

    def node(self, name: str) -> Node:
        """By id or host name; a revoked node only by its id. Refusal 404 when there is none."""
        for node in self.fleet.nodes.values():
            if node.hostname == name and not node.revoked:
                return node
        return self.fleet.node(name)

    def describe(self, name: str) -> dict[str, Any]:
        """What is known of a node, without any secret."""
        node = self.node(name)
        shown = {
            "id", "hostname", "public_key", "mesh_ip", "revoked", "registered_metadata", "capabilities", "endpoint",
            "nat_type", "reports", "executions",
        }  # fmt: skip
        heartbeats = self.arrivals.matching("heartbeat", node.id)
        return node.model_dump(include=shown) | {
            "streams": self._application.streams(node.id),
            "last_heartbeat": heartbeats[-1].body if heartbeats else None,
        }

    # --- what the nodes should be and are told

    def issue_token(self, value: str | None = None, *, lifetime: float | None = None) -> str:
        return self.fleet.issue_token(value, lifetime=lifetime)

    def state(self, name: str) -> dict[str, Any]:
        return self.fleet.state(self.node(name))

    def patch_state(self, name: str, members: Mapping[str, JsonValue], *, notify: bool = False) -> None:
        self.fleet.patch_state(self.node(name).id, members, notify=notify)

    def put_data(self, name: str, key: str, payload: JsonValue, content_type: str = "application/json") -> None:
        self.fleet.put_data(self.node(name).id, key, payload, content_type)

    def put_secret(self, name: str, key: str, value: bytes) -> None:
        self.fleet.put_secret(self.node(name).id, key, value)

    def put_artifact(self, version: str, arch: str, content: bytes) -> None:
        self._application.artifacts[version, "linux", arch] = content

    def ask(self, name: str, *, reconcile: bool = False, rotate_keys: bool = False) -> None:
        self.fleet.ask(self.node(name).id, reconcile=reconcile, rotate_keys=rotate_keys)

    def revoke(self, name: str) -> None:
        self.fleet.revoke(self.node(name).id)

    def restore(self, name: str) -> None:
        self.fleet.restore(self.node(name).id)

    def remove(self, name: str) -> None:
        self.fleet.remove(self.node(name).id)

    def emit(
        self,
        name: str,
        event_type: str,
        payload: JsonValue = None,
        *,
        payload_text: str | None = None,
        signer: Signer = "current",
        event_id: str | None = None,
        nonce: str | None = None,
        issued_at: str | None = None,
        size: int | None = None,
    ) -> str:
        """See `Fleet.emit`."""
        return self.fleet.emit(
            self.node(name).id, event_type, payload, payload_text=payload_text, signer=signer, event_id=event_id,
            nonce=nonce, issued_at=issued_at, size=size,
        )  # fmt: skip

    def emit_raw(self, name: str, data: bytes) -> None:
        self.fleet.emit_raw(self.node(name).id, data)

    def end_stream(self, name: str) -> None:
        self.fleet.end_stream(self.node(name).id)

    def set_stream(self, *, keepalive_seconds: float | None = None, retry_milliseconds: int | None = None) -> None:
        """For streams opened from now on: how often silence is broken, and the `retry:` they begin with."""
        if keepalive_seconds is not None:
            self._application.keepalive_seconds = keepalive_seconds
        self._application.retry_milliseconds = retry_milliseconds

    def streams(self, name: str) -> int:
        """How many connections follow the node's stream now."""
        return self._application.streams(self.node(name).id)

    def telemetry(self, name: str, pipeline: str) -> list[Entry]:
        """What was taken of `metrics`, `logs` or `audit`, oldest first."""
        return self._application.telemetry.entries(self._id(name) or name, pipeline)

    def follow_logs(self, name: str, pattern: str, expected: Mapping[str, int]) -> dict[str, Any]:
        """Whether numbered log lines are complete and in order; see `telemetry.follow`. With the markers of gaps."""
        entries = self.telemetry(name, "logs")
        found = follow(entries, re.compile(pattern), expected)
        return {
            "sources": {source: asdict(sequence) for source, sequence in found.items()},
            "gaps": [asdict(gap) for gap in gaps(entries)],
        }

    # --- faults

    @property
    def pending_faults(self) -> Sequence[Fault]:
        return self._faults.pending

    def inject(self, fault: Fault) -> None:
        """`fault.node_id` may be a host name."""
        if fault.node_id is not None:
            fault = fault.model_copy(update={"node_id": self.node(fault.node_id).id})
        self._faults.inject(fault)

    def clear_faults(self) -> None:
        self._faults.clear()

    async def stop_listening(self) -> None:
        """The control plane is gone: connections are cut, new ones refused, until `start_listening`."""
        await self._listener.stop()

    async def start_listening(self) -> None:
        await self._listener.start()

    # --- what arrived

    def arrived(
        self, endpoint: str | None = None, name: str | None = None, *, after: int = 0, where: Predicate | None = None
    ) -> Sequence[Arrival]:
        return self.arrivals.matching(endpoint, self._id(name), after=after, where=where)

    async def wait_for(
        self,
        endpoint: str | None = None,
        name: str | None = None,
        *,
        count: int = 1,
        after: int = 0,
        where: Predicate | None = None,
        timeout: float = 10.0,
    ) -> Sequence[Arrival]:
        """The first `count` arrivals that match; TimeoutError tells what came instead. See `Arrivals.wait_for`."""
        return await self.arrivals.wait_for(
            endpoint, self._id(name), count=count, after=after, where=where, timeout=timeout
        )

    def _id(self, name: str | None) -> str | None:
        """For looking back: a node that has left, or one that never was, is still a name to look for."""
        return next((node.id for node in self.fleet.nodes.values() if node.hostname == name), name)
