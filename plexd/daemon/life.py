"""The life of the daemon: sockets open, the node gets its identity, services run until a signal, and all ends in
the opposite order (docs/contract/lifecycle.md §1 and §12).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator

from plexd import log as logging
from plexd.api.assembly import ApiServer
from plexd.config.in_force import Configuration
from plexd.config.load import Loaded
from plexd.config.models import Config
from plexd.daemon.composition import Agent, Context, Deliveries, compose
from plexd.daemon.signals import Signals
from plexd.daemon.stopping import TELEMETRY_SECONDS, cancel, stop, within
from plexd.errors import LocalStateError
from plexd.identity.enrolment import TokenSearch, describe, load_or_register, make_control_plane, make_registrar
from plexd.identity.registration import Registrar
from plexd.linux import host, systemd
from plexd.linux.kernel import Kernel
from plexd.linux.lookup import use_own_threads
from plexd.log import get_logger
from plexd.masking import register_secret
from plexd.node.health import Condition, Health
from plexd.node.state import Node
from plexd.node.status import Overview, Phase
from plexd.runtime.supervisor import Groups
from plexd.runtime.waiting import unless_set
from plexd.store.files import DataDirectory
from plexd.store.identity import Identity, IdentityDamaged, IdentityStore
from plexd.store.snapshot import CachedSnapshot, SnapshotStore
from plexd.telemetry.assembly import Telemetry

log = get_logger("daemon")

LISTENING_MARGIN_SECONDS = 1.0


def run(load: Callable[[], Loaded]) -> int:
    """Run the node agent until a signal; the exit code. Raises FatalError when it cannot, or must not, go on.

    `load` reads the configuration, now and whenever it is to be read again; it raises ConfigError.
    """
    loaded = load()
    config = loaded.config
    host.prepare_process()
    logging.set_up(config.log_level, config.log_format)
    if loaded.path is None:
        log.info("no configuration file, using environment and defaults")
    for warning in loaded.warnings:
        log.warning("configuration warning", detail=warning)
    directory = DataDirectory(config.data_dir)
    try:
        return asyncio.run(_Life(config, load, directory).run())
    finally:
        directory.close()


class _Life:
    def __init__(self, config: Config, load: Callable[[], Loaded], directory: DataDirectory) -> None:
        self._notifier = systemd.Notifier()
        self._configuration = Configuration(config, load, self._announced)
        self._signals = Signals(self._configuration.read_again)
        self._health = Health()
        self._overview = Overview(config, self._health)
        self._api_server = ApiServer(config, directory, self._overview, self._configuration.read_again)
        self._overview.reports = self._api_server.reports
        self._configuration.on_read += [self._show_configuration, self._api_server.read_again]
        self._groups = Groups(self._show_flapping)
        self._work = self._groups.supervisor("services")
        self._accepted = asyncio.Event()
        self._early: asyncio.Task[None] | None = None
        self._context = Context(
            self._configuration,
            IdentityStore(directory),
            SnapshotStore(directory),
            TokenSearch(lambda: self._configuration.current.token, os.environ),
            self._health,
            self._overview,
            self._api_server,
            self._groups,
            self._notifier,
            time.monotonic(),
        )

    async def run(self) -> int:
        self._signals.handle()
        use_own_threads(asyncio.get_running_loop())
        context, configuration = self._context, self._configuration
        cached = await asyncio.to_thread(self._recall)
        if cached is not None:
            self._api_server.remember(cached[1].desired)
        async with self._listening():
            description = await asyncio.to_thread(describe, configuration.current)
            self._overview.description = description
            control = make_control_plane(configuration.current)
            registrar = make_registrar(
                lambda: configuration.current, control, description, context.identities, context.snapshots
            )
            telemetry = await asyncio.to_thread(
                Telemetry, lambda: configuration.current, control, description, self._accepted
            )
            deliveries = Deliveries(control, description, registrar, telemetry)
            try:
                async with self._telemetry(telemetry):
                    registrar.on_granted.append(telemetry.trail.node_registered)
                    identity = await self._identity(registrar)
                    if identity is None:
                        log.info("stopped before the node was registered")
                        return 0
                    if cached is None or cached[0] != identity.node_id:
                        cached = identity.node_id, await asyncio.to_thread(context.snapshots.load, identity.node_id)
                    await self._serve(identity, cached[1], deliveries)
                    return 0
            finally:
                await control.close()

    # before there is a node

    def _recall(self) -> tuple[str, CachedSnapshot] | None:
        """Which node this is and what it knew, before the first program can ask; what is wrong is said later."""
        try:
            identity = self._context.identities.look_again()
        except (IdentityDamaged, LocalStateError, OSError):
            return None
        return None if identity is None else (identity.node_id, self._context.snapshots.load(identity.node_id))

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        """Questions are answered from before the registration to after everything else has ended."""
        sockets = self._api_server.listening_sockets()
        with contextlib.ExitStack() as opened:
            for listening_socket in sockets:
                listening_socket.open()
                opened.callback(listening_socket.close)
            serving = self._groups.start("local api", list(sockets)) if sockets else None
            try:
                yield
            finally:
                self._api_server.stop()
                if serving is not None:
                    limit = self._configuration.current.node_api.shutdown_timeout.total_seconds()
                    await cancel(serving, limit + LISTENING_MARGIN_SECONDS)

    @contextlib.asynccontextmanager
    async def _telemetry(self, telemetry: Telemetry) -> AsyncIterator[None]:
        """What can't be read again is taken down from before the registration on."""
        self._overview.telemetry = telemetry
        self._early = self._groups.start("telemetry", list(telemetry.early_services))
        await telemetry.start()
        try:
            yield
        finally:
            await within(TELEMETRY_SECONDS, "deliver telemetry", self._finish(telemetry))

    async def _finish(self, telemetry: Telemetry) -> None:
        """The end of it, once."""
        early, self._early = self._early, None
        if early is not None:
            await telemetry.stop("stop signal" if self._signals.stopping.is_set() else "failure")
            await cancel(early)
            await telemetry.finish(self._signals.hurrying)

    async def _identity(self, registrar: Registrar) -> Identity | None:
        """None when a stop signal came before there was one."""
        self._notifier.send("STATUS=starting")
        self._overview.phase = Phase.REGISTERING
        extending = asyncio.create_task(self._extend_start(), name="extend start")
        config, context = self._configuration.current, self._context
        try:
            return await unless_set(
                self._signals.stopping, load_or_register(config, context.identities, registrar, context.tokens)
            )
        finally:
            extending.cancel()

    async def _extend_start(self) -> None:
        """Registration may take minutes: the service manager is told that it goes on."""
        while True:
            await asyncio.sleep(10)
            self._notifier.send("STATUS=registering", "EXTEND_TIMEOUT_USEC=30000000")

    # as a node

    async def _serve(self, identity: Identity, cached: CachedSnapshot, deliveries: Deliveries) -> None:
        control = deliveries.control
        register_secret(identity.node_key.get_secret_value())
        if identity.private_key is not None:
            register_secret(identity.private_key.reveal())
        node = Node(identity, cached.desired, cached.fetched_at, self._health, self._accepted)
        control.use_identity(lambda: node.identity.node_id, node.credential, node.suspect)
        if node.desired.signing_keys is None:
            node.adopt_signing_keys(await asyncio.to_thread(self._context.identities.load_signing_keys))
        control.on_clock_offset = self._show_clock_offset
        kernel = Kernel()
        try:
            await self._work_until_stopped(compose(self._context, deliveries, node, kernel, self._work), deliveries)
        finally:
            await kernel.close()

    async def _work_until_stopped(self, agent: Agent, deliveries: Deliveries) -> None:
        self._health.on_change.append(self._show_health)
        working = asyncio.create_task(self._work.run(agent.work), name="services")
        recovering = self._groups.start("recovery", [agent.recovery])
        vital = self._groups.start("vital services", agent.vital)
        self._overview.phase = Phase.RUNNING
        stopping = asyncio.create_task(self._signals.stopping.wait(), name="stop signal")
        self._notifier.send("READY=1", "STATUS=running")
        config = self._configuration.current
        log.info("plexd started", interface=config.mesh.interface, api=config.api)
        try:
            await asyncio.wait({working, recovering, vital, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in (working, recovering, vital):
                if task.done():
                    task.result()  # a FatalError of a service ends the process
        finally:
            self._overview.phase = Phase.STOPPING
            self._api_server.stop()
            self._notifier.send("STOPPING=1", "STATUS=stopping")
            log.info("plexd stops")
            stopping.cancel()
            await cancel(recovering)
            await cancel(working)
            finishing = self._finish(deliveries.telemetry)
            is_asked = self._signals.stopping.is_set()
            hurrying = self._signals.hurrying
            await stop(agent, self._context, deliveries, vital, finishing, hurrying, is_asked=is_asked)

    # what others get to know of it

    @contextlib.contextmanager
    def _announced(self) -> Iterator[None]:
        """The service manager knows of a reload for as long as it takes."""
        if self._overview.phase is Phase.RUNNING:
            self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            if self._overview.phase is Phase.RUNNING:
                self._notifier.send("READY=1")

    async def _show_configuration(self) -> None:
        self._overview.config = self._configuration.current

    def _show_health(self) -> None:
        findings = self._health.findings()
        status = "degraded: " + ", ".join(f.condition.value for f in findings) if findings else "running"
        self._notifier.send(f"STATUS={status}")

    def _show_flapping(self, names: frozenset[str]) -> None:
        self._health.set(Condition.SUBSYSTEM_STOPPED, bool(names), ", ".join(sorted(names)))

    def _show_clock_offset(self, seconds: float) -> None:
        self._health.set(Condition.CLOCK_SKEW, abs(seconds) > 60, f"{seconds:+.0f} s")
