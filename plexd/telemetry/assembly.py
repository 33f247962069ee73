"""The pipelines of this node, put together from the configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from plexd.config.models import Config
from plexd.config.models import Pipeline as Settings
from plexd.control import ControlPlane
from plexd.linux import host
from plexd.node import Node
from plexd.store.cursors import Cursors
from plexd.store.quarantine import quarantine
from plexd.telemetry.gaps import Gap
from plexd.telemetry.metrics import Agent, Group, Latency, Mesh, Metrics, System, Tunnel
from plexd.telemetry.pipeline import Form, Pipeline, disabled
from plexd.telemetry.window import Limits
from plexd.wire import endpoints
from plexd.wire.endpoints import Endpoint

FINISH_SECONDS = 5.0  # for each pipeline at the end, all of them side by side


class Runnable(Protocol):
    """A service, as the supervisor runs it."""

    @property
    def name(self) -> str: ...

    async def run(self) -> None: ...


class Telemetry:
    """Made once the node has an identity. `services` are to be run, `wake` to be called when the control plane was
    reached, `finish` after the services have ended.
    """

    def __init__(self, config: Config, control: ControlPlane, node: Node, mesh: Mesh) -> None:
        """Reads the positions: blocks. Raises LocalStateError."""
        self._config = config
        self._control = control
        self._node = node
        self._directory = config.data_dir / "telemetry"
        self._cursors = Cursors(self._directory)
        self._cursors.load()
        self._pipelines: dict[str, Pipeline] = {}
        if config.observe.enabled:
            self._build_metrics(mesh)

    @property
    def services(self) -> Sequence[Runnable]:
        return [*self._pipelines.values(), self._cursors]

    def wake(self) -> None:
        for pipeline in self._pipelines.values():
            pipeline.wake()

    async def finish(self) -> None:
        """Send what there is as far as that is quick, and write the positions."""
        await asyncio.gather(*(pipeline.finish(FINISH_SECONDS) for pipeline in self._pipelines.values()))
        if (metrics := self._pipelines.get("metrics")) is not None:
            metrics.drop_rest()
        await self._cursors.save()

    def status(self, name: str) -> Mapping[str, Any]:
        """The body of the status routes, for `metrics`, `logs` or `audit`."""
        pipeline = self._pipelines.get(name)
        return pipeline.status() if pipeline is not None else disabled()

    def _build_metrics(self, mesh: Mesh) -> None:
        observe, node = self._config.observe, self._node
        pipeline = self._pipeline("metrics", observe, endpoints.METRICS, _MetricForm(), keeps_when_unprovisioned=False)
        interval = observe.interval.total_seconds()
        interface = self._config.mesh.interface
        disk = observe.disk_path
        if disk == Path("/") and host.is_container():
            disk = self._config.data_dir
        latency = Latency(node, interface, observe.latency_probes, observe.latency_max_peers, interval / 2)
        tunnel = Tunnel(mesh, latency.packet_loss_percent, observe.handshake_stale_after.total_seconds())
        groups: dict[str, Callable[[], Group]] = {
            "system": lambda: System(disk, observe.network_interfaces, [interface]),
            "tunnel": lambda: tunnel,
            "latency": lambda: latency,
            "agent": lambda: Agent(node.contact, tunnel, latency, self._gauges),
        }
        pipeline.sources.append(Metrics(pipeline, [groups[name]() for name in observe.metrics], interval))

    def _gauges(self) -> Mapping[str, Any]:
        return {name: pipeline.gauges() for name, pipeline in self._pipelines.items()}

    def _pipeline(
        self, name: str, settings: Settings, endpoint: Endpoint, form: Form, *, keeps_when_unprovisioned: bool = True
    ) -> Pipeline:
        async def put_aside(bodies: Sequence[bytes]) -> Path:
            return await asyncio.to_thread(quarantine, self._directory / "quarantine", name, bodies)

        pipeline = self._pipelines[name] = Pipeline(
            name,
            Limits(
                batch_entries=settings.batch_max_size,
                batch_bytes=settings.max_batch_bytes,
                batch_seconds=settings.batch_interval.total_seconds(),
                entries=settings.buffer_size,
                bytes=settings.buffer_bytes,
            ),
            form,
            partial(self._control.deliver, endpoint),
            self._node.accepted,
            put_aside,
            keeps_when_unprovisioned=keeps_when_unprovisioned,
            save=self._cursors.touch,
        )
        return pipeline


class _MetricForm:
    """Points that are lost leave no marker, and have no text to cut."""

    def marker(self, gap: Gap) -> bytes | None:  # noqa: ARG002
        return None

    def shorten(self, body: bytes) -> bytes | None:  # noqa: ARG002
        return None
