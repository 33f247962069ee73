"""The audit pipeline: what feeds it, put together from the configuration."""

from __future__ import annotations

from pathlib import Path

from plexd.audit.kubernetes import Selection
from plexd.audit.types import type_number
from plexd.config.models import Audit as Settings
from plexd.store.cursors import Cursors
from plexd.store.spool import Spool
from plexd.telemetry.agent_audit import AgentAudit
from plexd.telemetry.audit_encoder import AuditEncoder
from plexd.telemetry.auditd import Events, KernelAudit, LinuxAudit, LogAudit
from plexd.telemetry.kubernetes import KubernetesAudit, find_log
from plexd.telemetry.pipeline import Pipeline
from plexd.telemetry.spooled import Spooled


class Audit:
    """Adds its sources to the pipeline, and has the trail lead into it."""

    def __init__(
        self,
        settings: Settings,
        data_dir: Path,
        pipeline: Pipeline,
        cursors: Cursors,
        form: AuditEncoder,
        trail: AgentAudit,
    ) -> None:
        self._settings = settings
        self._pipeline = pipeline
        self._cursors = cursors
        self._form = form
        spool = Spool(data_dir / "telemetry" / "audit-spool", settings.spool_max_bytes)
        self.spooled = Spooled("spool", pipeline, spool, cursors, "audit_spool")
        trail.lead_into(pipeline, self.spooled)
        pipeline.sources.append(self.spooled)
        if settings.auditd.enabled:
            pipeline.sources.append(self._linux(data_dir))
        if settings.kubernetes.enabled:
            pipeline.sources.append(self._kubernetes())

    def _linux(self, data_dir: Path) -> LinuxAudit:
        settings = self._settings.auditd
        numbers = {type_number(name) for name in settings.exclude_types}
        events = Events(self._form, data_dir, frozenset(number for number in numbers if number is not None))
        kernel = written = None
        if settings.method != "file":
            backlog = settings.log_path if settings.backfill else None
            kernel = KernelAudit(self._pipeline, self.spooled, self._cursors, events, backlog)
        if settings.method != "netlink":
            interval = self._settings.interval.total_seconds()
            written = LogAudit(self._pipeline, self._cursors, events, settings.log_path, interval)
        return LinuxAudit(self._pipeline.row(LinuxAudit.name), kernel, written)

    def _kubernetes(self) -> KubernetesAudit:
        settings = self._settings.kubernetes
        selection = Selection(
            settings.stages, settings.exclude_verbs, settings.exclude_users, strip_bodies=settings.strip_bodies
        )
        configured = settings.log_path
        return KubernetesAudit(
            self._pipeline,
            self._cursors,
            self._form,
            selection,
            (lambda: Path(configured)) if configured else find_log,
            self._settings.interval.total_seconds(),
            is_expected=settings.enabled is True,
        )
