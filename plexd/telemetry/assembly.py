"""The pipelines of this node, put together from the configuration."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from plexd.config.models import Config
from plexd.config.models import Pipeline as Settings
from plexd.control import ControlPlane
from plexd.linux import host
from plexd.log import add_listener, detect_format
from plexd.node.control_calls import SelfDescription
from plexd.node.state import Node
from plexd.runtime.component import Component
from plexd.runtime.exchange import Exchangeable
from plexd.runtime.waiting import unless_set
from plexd.store.cursors import Cursors
from plexd.store.quarantine import quarantine
from plexd.telemetry.agent_audit import AgentAudit
from plexd.telemetry.audit import Audit
from plexd.telemetry.audit_encoder import AuditEncoder
from plexd.telemetry.counters import Counters
from plexd.telemetry.files import Files
from plexd.telemetry.gaps import Gap, parse_gaps
from plexd.telemetry.journal import NAME as JOURNALD
from plexd.telemetry.journal import Journal
from plexd.telemetry.metrics import Agent, Group, Latency, Mesh, Metrics, System, Tunnel
from plexd.telemetry.own_log import OwnLog
from plexd.telemetry.pipeline import EntryEncoder, Pipeline, disabled
from plexd.telemetry.records import OWN_SOURCE, LogEncoder, log_marker, shortened
from plexd.telemetry.severity import Filter, parse_severity
from plexd.telemetry.spooled import Spooled
from plexd.telemetry.window import Limits
from plexd.wire import endpoints
from plexd.wire.endpoints import Endpoint

_POSITIONS = {"metrics": (), "logs": ("journald", "files"), "audit": ("auditd", "auditd_log", "k8s_audit")}
READ_OUT_SECONDS = 1.0
FINISH_SECONDS = 5.0  # for each pipeline at the end, all of them side by side


class Runnable(Protocol):
    """A service, as the supervisor runs it."""

    @property
    def name(self) -> str: ...

    async def run(self) -> None: ...


class Telemetry:
    """The pipelines of metrics, logs and audit.

    `early_services` run from the start, because audit events that cannot be read again wait on disk for the
    registration. `component` gives the other pipelines once the node has an identity. Call `stop` before the services
    end, and `finish` after that. `trail` records the audit events of the agent itself.
    """

    def __init__(
        self,
        configuration: Callable[[], Config],
        control: ControlPlane,
        description: SelfDescription,
        accepted: asyncio.Event,
    ) -> None:
        """Reads the positions from disk: blocks. Raises LocalStateError.

        `configuration` is asked whenever a pipeline is built. Nothing is delivered before `accepted` is set.
        """
        self._configuration = configuration
        self._control = control
        self._description = description
        self._accepted = accepted
        self._directory = configuration().data_dir / "telemetry"
        self._cursors = Cursors(self._directory)
        self._cursors.load()
        self._pipelines: dict[str, Pipeline] = {}
        self._counters: dict[str, Counters] = {}
        self._own_log: OwnLog | None = None
        self._is_joined = False
        self.trail = AgentAudit(description.hostname)
        self._audit: Audit | None = None
        self._spooled_before: Spooled | None = None
        self._audit_pipeline = Exchangeable("audit", self._build_audit, Pipeline.run, self._retire_audit)

    @property
    def early_services(self) -> Sequence[Runnable]:
        return [self._audit_pipeline, self._cursors]

    def component(self, node: Node, mesh: Mesh) -> Component:
        """What begins with the registration."""
        self._is_joined = True
        node.on_renewed.append(self._node_renewed)
        metrics = Exchangeable("metrics", partial(self._build_metrics, node, mesh), Pipeline.run, self._retire)
        logs = Exchangeable("logs", self._build_logs, Pipeline.run, self._retire)
        return Component(
            services=(metrics, logs),
            live={"observe": metrics.exchange, "logs": logs.exchange, "audit": self._audit_pipeline.exchange},
            stream_connected=(self._wake,),
        )

    async def start(self) -> None:
        """Tell that the agent runs; on disk when this returns."""
        await self.trail.agent_started(self._description.version, self._description.checksum)

    async def stop(self, reason: str) -> None:
        """Tell why the agent stops, and read what is on disk, so that it may still be delivered."""
        await self.trail.agent_stopped(self._description.version, self._description.checksum, reason)
        if self._audit is not None:
            await self._audit.spooled.read_out(READ_OUT_SECONDS)

    def _wake(self) -> None:
        for pipeline in self._pipelines.values():
            pipeline.wake()

    def _node_renewed(self) -> None:
        for pipeline in self._pipelines.values():
            pipeline.node_renewed()

    async def finish(self, hurrying: asyncio.Event) -> None:
        """Send what there is as far as that is quick and until `hurrying` is set, and write the positions."""
        if self._audit is not None:
            await self._audit.spooled.flush()  # events that were incomplete until the stream ended
        await unless_set(hurrying, self._send_rest())
        if (metrics := self._pipelines.get("metrics")) is not None:
            metrics.drop_rest()
        await self._cursors.save()

    async def _send_rest(self) -> None:
        await asyncio.gather(*(pipeline.finish(FINISH_SECONDS) for pipeline in self._pipelines.values()))

    def status(self, name: str) -> Mapping[str, Any] | None:
        """The body of the status routes, for `metrics`, `logs` or `audit`; None for what the registration begins."""
        pipeline = self._pipelines.get(name)
        if pipeline is not None:
            return pipeline.status()
        return disabled() if self._is_joined or name == "audit" else None

    def _build_audit(self) -> Pipeline | None:
        audit = self._configuration().audit
        if not audit.enabled:
            return None
        form = AuditEncoder(self._description.hostname, audit.max_raw_size)
        pipeline = self._pipeline("audit", audit, endpoints.AUDIT, form)
        self._audit = Audit(audit, self._configuration().data_dir, pipeline, self._cursors, form, self.trail)
        if self._spooled_before is not None:
            self._audit.spooled.succeed(self._spooled_before)
            self._spooled_before = None
        return pipeline

    async def _retire_audit(self, pipeline: Pipeline) -> None:
        """What the agent does meanwhile goes to the spool that was."""
        await self._retire(pipeline)
        if self._audit is not None:
            await self._audit.spooled.retire()
            self._spooled_before, self._audit = self._audit.spooled, None
            self._cursors.release("audit_spool")
        self.trail.lead_nowhere()

    async def _retire(self, pipeline: Pipeline) -> None:
        """It has ended; what it cannot send at once is read again by the next one, but for what can't be."""
        await pipeline.finish(FINISH_SECONDS)
        pipeline.drop_rest(lambda feed: pipeline.name != "metrics" and feed != OwnLog.name)
        for source in pipeline.sources:
            if isinstance(source, Files):
                source.close()
        for section in (f"{pipeline.name}_gaps", *_POSITIONS[pipeline.name]):
            self._cursors.release(section)
        self._pipelines.pop(pipeline.name, None)

    def _build_metrics(self, node: Node, mesh: Mesh) -> Pipeline | None:
        observe = self._configuration().observe
        if not observe.enabled:
            return None
        pipeline = self._pipeline(
            "metrics", observe, endpoints.METRICS, _MetricEncoder(), keeps_when_unprovisioned=False
        )
        interval = observe.interval.total_seconds()
        interface = self._configuration().mesh.interface
        disk = observe.disk_path
        if disk == Path("/") and host.is_container():
            disk = self._configuration().data_dir
        latency = Latency(node, interface, observe.latency_probes, observe.latency_max_peers, interval / 2)
        tunnel = Tunnel(mesh, latency.packet_loss_percent, observe.handshake_stale_after.total_seconds())
        groups: dict[str, Callable[[], Group]] = {
            "system": lambda: System(disk, observe.network_interfaces, [interface]),
            "tunnel": lambda: tunnel,
            "latency": lambda: latency,
            "agent": lambda: Agent(node.connection, tunnel, latency, self._gauges),
        }
        pipeline.sources.append(Metrics(pipeline, [groups[name]() for name in observe.metrics], interval))
        return pipeline

    def _build_logs(self) -> Pipeline | None:
        if not self._configuration().logs.enabled:
            return None
        logs, unit, hostname = (
            self._configuration().logs,
            self._configuration().systemd.unit,
            self._description.hostname,
        )
        pipeline = self._pipeline("logs", logs, endpoints.LOGS, _LogEncoders(hostname, unit))
        least = logs.filter.min_severity
        wanted = Filter(
            parse_severity(least) if least else None, logs.filter.include_units, logs.filter.exclude_units, unit
        )

        def form(source: str) -> LogEncoder:
            return LogEncoder(source, hostname, logs.max_line_size)

        if logs.journald.enabled:
            pipeline.sources.append(
                Journal(
                    pipeline,
                    self._cursors,
                    form(JOURNALD),
                    wanted,
                    lookback=logs.initial_lookback.total_seconds(),
                    directory=Path(logs.journald.directory) if logs.journald.directory else None,
                    sees_all=os.geteuid() == 0,
                    is_wanted=lambda transport: not (transport == "audit" and "audit" in self._pipelines),
                )
            )
        if logs.file_patterns:
            pipeline.sources.append(
                Files(
                    pipeline,
                    self._cursors,
                    form,
                    wanted,
                    patterns=logs.file_patterns,
                    interval=logs.interval.total_seconds(),
                    from_beginning=logs.start_at == "beginning",
                    max_line_bytes=logs.max_line_size,
                )
            )
        if detect_format(sys.stderr, os.environ) != "journal":
            if self._own_log is None:
                self._own_log = OwnLog(pipeline, form(OWN_SOURCE), unit)
                add_listener(self._own_log.add)
            else:
                self._own_log.move(pipeline, form(OWN_SOURCE))
            pipeline.sources.append(self._own_log)
        return pipeline

    def _gauges(self) -> Mapping[str, Any]:
        return {name: pipeline.gauges() for name, pipeline in self._pipelines.items()}

    def _pipeline(
        self,
        name: str,
        settings: Settings,
        endpoint: Endpoint,
        form: EntryEncoder,
        *,
        keeps_when_unprovisioned: bool = True,
    ) -> Pipeline:
        async def put_aside(bodies: Sequence[bytes]) -> Path:
            return await asyncio.to_thread(quarantine, self._directory / "quarantine", name, bodies)

        def owed() -> list[list[Any]]:
            return [list(gap) for gap in pipeline.owed_gaps]

        stored = self._cursors.register(f"{name}_gaps", owed)
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
            self._accepted,
            put_aside,
            keeps_when_unprovisioned=keeps_when_unprovisioned,
            owed=parse_gaps(stored),
            counters=self._counters.setdefault(name, Counters()),
            save=self._cursors.touch,
        )
        return pipeline


class _LogEncoders:
    def __init__(self, hostname: str, unit: str) -> None:
        self._hostname = hostname
        self._unit = unit

    def marker(self, gap: Gap) -> bytes | None:
        return log_marker(gap, time.time(), self._hostname, self._unit)

    def shorten(self, body: bytes) -> bytes | None:
        return shortened(body, "message")


class _MetricEncoder:
    """Points that are lost leave no marker, and have no text to cut."""

    def marker(self, gap: Gap) -> bytes | None:  # noqa: ARG002
        return None

    def shorten(self, body: bytes) -> bytes | None:  # noqa: ARG002
        return None
