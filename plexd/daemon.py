"""The one place that sees everything: builds adapters and services from configuration and identity, runs them until a
signal, and stops them in order (lifecycle contract, sections 1 and 12).
"""

from __future__ import annotations

# first, before httpx and structlog bring what a daemon does not need
import plexd.lean  # noqa: F401

# isort: split
import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from plexd import log as logging
from plexd.config.load import Loaded
from plexd.config.models import Config
from plexd.config.reload import Reloaded, is_below, take_over
from plexd.control import ControlPlane
from plexd.converge import Converger
from plexd.enrolment import TokenSearch, describe, load_or_register, make_control_plane, make_registrar
from plexd.errors import ConfigError, ControlError, KernelError, LocalStateError, Unauthenticated
from plexd.front import Front
from plexd.health import Condition, Health
from plexd.linux import host, systemd
from plexd.linux.kernel import Kernel
from plexd.linux.lookup import look_up, use_own_threads
from plexd.linux.stun import StunClient
from plexd.log import get_logger
from plexd.masking import register_secret
from plexd.mesh import firewall
from plexd.mesh.nat import Finding
from plexd.mesh.observed import Backend
from plexd.mesh.policy import Action
from plexd.mesh.target import Settings
from plexd.node import Node
from plexd.overview import Membership, Overview, Phase
from plexd.renewal import Renewal
from plexd.services.addresses import HostAddresses
from plexd.services.capabilities import Capabilities
from plexd.services.clocks import Clocks
from plexd.services.drift import DriftReports
from plexd.services.effects import Effects
from plexd.services.endpoint import Discovery, EndpointReport, stated
from plexd.services.fallback import Fallback
from plexd.services.garbage import Garbage
from plexd.services.heartbeat import Heartbeat
from plexd.services.listener import Listener
from plexd.services.persist import Persist
from plexd.services.reconcile import Reconcile
from plexd.services.recovery import Recovery
from plexd.services.refusals import Refusals
from plexd.services.registration import Registrar
from plexd.services.repair import Repair
from plexd.services.resolve import Resolve
from plexd.services.rotation import Rotation
from plexd.services.watchdog import Watchdog
from plexd.store.files import DataDirectory
from plexd.store.identity import Identity, IdentityDamaged, IdentityStore
from plexd.store.snapshot import CachedSnapshot, SnapshotStore
from plexd.supervisor import Exchangeable, Service, Supervisor
from plexd.telemetry.assembly import Telemetry
from plexd.uplink import SelfDescription, Uplink
from plexd.wire.envelope import Verifier

log = get_logger("daemon")

STOP_STEP_SECONDS = 5.0
STOP_MARGIN_SECONDS = 1.0
REPORTS_SECONDS = 3.0
DEREGISTER_SECONDS = 10.0
TEAR_DOWN_SECONDS = 10.0
TELEMETRY_SECONDS = 6.0  # 5 to deliver, then positions are written
STOP_TOTAL_SECONDS = 50.0  # after this what is still open is abandoned

T = TypeVar("T")


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
        return asyncio.run(_Daemon(config, load, directory).run())
    finally:
        directory.close()


class _Daemon:
    def __init__(self, config: Config, load: Callable[[], Loaded], directory: DataDirectory) -> None:
        self._config = config
        self._load = load
        self._reloading = asyncio.Lock()
        # what a changed key or section of the configuration does; a key that is nowhere in here waits for a restart
        self._live: dict[str, Callable[[], None]] = {
            "log_level": self._set_up_log,
            "log_format": self._set_up_log,
            "token": _read_when_needed,
            "registration": _read_when_needed,
            "deregister_on_shutdown": _read_when_needed,
            "mesh.keep_on_stop": _read_when_needed,
        }
        self._identities = IdentityStore(directory)
        self._snapshots = SnapshotStore(directory)
        self._tokens = TokenSearch(lambda: self._config.token, os.environ)
        self._notify = systemd.Notifier()
        self._stopping = asyncio.Event()
        self._signals = 0
        self._started_at = time.monotonic()
        self._health = Health()
        self._overview = Overview(config, self._health)
        self._front = Front(config, directory, self._overview, self._reload)
        self._overview.reports = self._front.reports
        self._endpoint: EndpointReport | None = None
        self._accepted = asyncio.Event()
        self._early: asyncio.Task[None] | None = None
        self._flapping: dict[str, frozenset[str]] = {}
        self._work = self._supervisor("services")

    async def run(self) -> int:
        self._handle_signals()
        use_own_threads(asyncio.get_running_loop())
        cached = await asyncio.to_thread(self._recall)
        if cached is not None:
            self._front.remember(cached[1].desired)
        async with self._doors():
            description = await asyncio.to_thread(describe, self._config)
            self._overview.description = description
            control = make_control_plane(self._config)
            registrar = make_registrar(lambda: self._config, control, description, self._identities, self._snapshots)
            try:
                async with self._telemetry(control, description) as telemetry:
                    if telemetry.trail is not None:
                        registrar.on_granted.append(telemetry.trail.node_registered)
                    identity = await self._identity(registrar)
                    if identity is None:
                        log.info("stopped before the node was registered")
                        return 0
                    if cached is None or cached[0] != identity.node_id:
                        cached = identity.node_id, await asyncio.to_thread(self._snapshots.load, identity.node_id)
                    return await self._serve(identity, cached[1], control, description, registrar, telemetry)
            finally:
                await control.close()

    def _recall(self) -> tuple[str, CachedSnapshot] | None:
        """Which node this is and what it knew, before the first program can ask; what is wrong is said later."""
        try:
            identity = self._identities.look_again()
        except (IdentityDamaged, LocalStateError, OSError):
            return None
        return None if identity is None else (identity.node_id, self._snapshots.load(identity.node_id))

    @contextlib.asynccontextmanager
    async def _doors(self) -> AsyncIterator[None]:
        """Questions are answered from before the registration to after everything else has ended."""
        doors = self._front.doors()
        with contextlib.ExitStack() as opened:
            for door in doors:
                door.open()
                opened.callback(door.close)
            serving = self._supervise("local api", list(doors)) if doors else None
            try:
                yield
            finally:
                self._front.stop()
                if serving is not None:
                    limit = self._config.node_api.shutdown_timeout.total_seconds() + STOP_MARGIN_SECONDS
                    await _cancel(serving, limit)

    @contextlib.asynccontextmanager
    async def _telemetry(self, control: ControlPlane, description: SelfDescription) -> AsyncIterator[Telemetry]:
        """What can't be read again is taken down from before the registration on."""
        telemetry = await asyncio.to_thread(Telemetry, self._config, control, description, self._accepted)
        self._overview.telemetry = telemetry
        self._early = self._supervise("telemetry", list(telemetry.early_services))
        await telemetry.start()
        try:
            yield telemetry
        finally:
            await _do("deliver telemetry", TELEMETRY_SECONDS, self._finish(telemetry))

    async def _finish(self, telemetry: Telemetry) -> None:
        """The end of it, once."""
        early, self._early = self._early, None
        if early is not None:
            await telemetry.stop("stop signal" if self._stopping.is_set() else "failure")
            await _cancel(early)
            await telemetry.finish()

    # signals

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal)
        loop.add_signal_handler(signal.SIGUSR1, self._on_dump_signal)
        loop.add_signal_handler(signal.SIGHUP, self._on_reload_signal)

    def _on_stop_signal(self) -> None:
        self._signals += 1
        if self._signals == 1:
            asyncio.get_running_loop().call_later(STOP_TOTAL_SECONDS, self._abandon)
        if self._signals > 2:
            log.error("third stop signal, ending at once")
            os._exit(1)
        self._stopping.set()

    def _abandon(self) -> None:
        log.error("stop took too long, open steps abandoned", limit_seconds=STOP_TOTAL_SECONDS)
        os._exit(1)

    def _on_dump_signal(self) -> None:
        for task in asyncio.all_tasks():
            log.info("task", name=task.get_name(), at=_innermost(task))

    def _on_reload_signal(self) -> None:
        self._reload_task = asyncio.create_task(self._reload_or_log(), name="reload")

    async def _reload_or_log(self) -> None:
        with contextlib.suppress(ConfigError):  # it has been said
            await self._reload()

    async def _reload(self) -> Reloaded:
        """Read the configuration again and apply what can be; any mistake leaves all as it is. Raises ConfigError."""
        async with self._reloading:
            if self._overview.phase is Phase.RUNNING:
                self._notify.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                loaded = await asyncio.to_thread(self._load)
                reloaded = take_over(self._config, loaded.config, self._live)
                self._config = self._overview.config = reloaded.config
                for name, apply in self._live.items():
                    if any(is_below(key, {name}) for key in reloaded.changed):
                        apply()
                await self._front.read_again()
            except ConfigError as exc:
                log.error("configuration not reloaded", problems=list(exc.problems), next_step="the old one stays")
                raise
            finally:
                if self._overview.phase is Phase.RUNNING:
                    self._notify.send("READY=1")
            for warning in loaded.warnings:
                log.warning("configuration warning", detail=warning)
            log.info("configuration reloaded", changed=reloaded.changed, restart_required=reloaded.restart_required)
            return reloaded

    def _set_up_log(self) -> None:
        logging.set_up(self._config.log_level, self._config.log_format)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`, None when a stop signal came first; `work` is cancelled then."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for future in (task, stop):
                if not future.done():
                    future.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await future

    # start

    async def _identity(self, registrar: Registrar) -> Identity | None:
        self._notify.send("STATUS=starting")
        self._overview.phase = Phase.REGISTERING
        extending = asyncio.create_task(self._extend_start(), name="extend start")
        try:
            return await self._unless_stopped(load_or_register(self._config, self._identities, registrar, self._tokens))
        finally:
            extending.cancel()

    async def _extend_start(self) -> None:
        """Registration may take minutes: the service manager is told that it goes on."""
        while True:
            await asyncio.sleep(10)
            self._notify.send("STATUS=registering", "EXTEND_TIMEOUT_USEC=30000000")

    async def _serve(
        self,
        identity: Identity,
        cached: CachedSnapshot,
        control: ControlPlane,
        description: SelfDescription,
        registrar: Registrar,
        telemetry: Telemetry,
    ) -> int:
        config = self._config
        register_secret(identity.node_key.get_secret_value())
        if identity.private_key is not None:
            register_secret(identity.private_key.reveal())
        health = self._health
        node = Node(identity, cached.desired, cached.fetched_at, health, self._accepted)
        control.use_identity(lambda: node.identity.node_id, node.credential, node.suspect)
        if node.desired.signing_keys is None:
            node.adopt_signing_keys(await asyncio.to_thread(self._identities.load_signing_keys))
        control.on_clock_offset = lambda seconds: health.set(
            Condition.CLOCK_SKEW, abs(seconds) > 60, f"{seconds:+.0f} s"
        )
        kernel = Kernel(config.mesh.interface, config.mesh.backend, config.mesh.userspace_program)
        try:
            work, vital, persist, drift = self._compose(
                node, health, control, description, kernel, registrar, telemetry
            )
            try:
                await self._run_services(work, vital, health)
            finally:
                await self._stop(persist, drift, telemetry, node, kernel, control)
            return 0
        finally:
            await kernel.close()

    def _compose(
        self,
        node: Node,
        health: Health,
        control: ControlPlane,
        description: SelfDescription,
        kernel: Kernel,
        registrar: Registrar,
        telemetry: Telemetry,
    ) -> tuple[list[Service], list[Service], Persist, DriftReports]:
        """The services that end first at a stop, those that go on until its end, and the two asked to save."""
        config = self._config
        host_of_api = urlsplit(config.api or "").hostname or ""

        def settings(identity: Identity) -> Settings | None:
            if identity.private_key is None:
                return None
            mesh = self._config.mesh
            return Settings(
                node_id=identity.node_id,
                interface=mesh.interface,
                private_key=identity.private_key,
                mesh_ip=identity.mesh_ip,
                listen_port=mesh.listen_port,
                mtu=mesh.mtu,
                keepalive=mesh.persistent_keepalive,
                backend=None if mesh.backend == "auto" else Backend(mesh.backend),
                control_plane=resolve.control_plane,
                policy=_firewall_settings(self._config, identity),
            )

        def finding() -> Finding | None:
            return self._endpoint.finding if self._endpoint is not None else None

        def traverse() -> asyncio.Task[None]:
            """What finds the ways through NATs, as configured now."""
            self._endpoint = self._endpoint_report(uplink, node, converger, kernel)
            services: list[Service] = []
            if self._endpoint is not None:
                services += [self._endpoint, HostAddresses(kernel, readdressed)]
            if self._config.nat_traversal.fallback == "relay":
                services.append(Fallback(converger))
            return self._supervise("nat traversal", services)

        def readdressed(reason: str) -> None:
            control.forget_connections()
            look_again(reason)

        def look_again(reason: str) -> None:
            if self._endpoint is not None:
                self._endpoint.request(reason)

        converger = Converger(kernel, node, settings, health)
        uplink = Uplink(
            control,
            node,
            health,
            description,
            converger.status,
            finding,
            self._started_at,
        )
        self._overview.membership = Membership(node, converger, finding)
        persist = Persist(node, self._snapshots, self._identities)
        interval = config.reconcile.interval.total_seconds()
        drift = DriftReports(uplink, node, self._snapshots)
        reconcile = Reconcile(uplink, converger, node, drift.cycle_ended, persist.save_signing_keys, health, interval)
        resolve = Resolve(node, converger.resolved, host_of_api, reconcile.request_pass)
        converger.on_unresolved = resolve.names_changed.set
        rotation = Rotation(uplink, self._identities, node, converger.apply_event, reconcile.request)
        refusals = Refusals(uplink, node)
        effects = Effects(
            node,
            uplink.own,
            converger.apply_event,
            reconcile.request,
            rotation.request,
            refusals.refuse_action,
            refusals.refuse_session,
            persist.save_signing_keys,
            persist.save_entries,
        )
        listener = Listener(control, node, Verifier(), effects.handle, reconcile.request, health, interval)
        heartbeat = Heartbeat(
            uplink.beat, node, config.heartbeat.interval.total_seconds(), reconcile.request, rotation.request
        )
        rotation.on_rotated.append(heartbeat.request)
        renewal = Renewal(
            node,
            self._identities,
            self._snapshots,
            registrar,
            self._tokens,
            self._work.paused,
            persist.writing,
            converger.converge,
        )
        self._recovery = Recovery(node, renewal, heartbeat.probe, heartbeat.interval)
        work: list[Service] = [
            reconcile,
            listener,
            resolve,
            rotation,
            refusals,
            Capabilities(uplink, node),
            _Watch("watch network", partial(kernel.watch, converger.is_wanted)),
            _Watch("watch firewall", kernel.watch_firewall),
            Repair(kernel, converger, converger.up, drift.cycle_ended),
            Clocks(reconcile.request),
            *self._front.join(node, uplink, listener.on_connected, reconcile.request),
            Garbage(),
            traversal := Exchangeable("nat traversal", traverse),
        ]
        converger.on_created = partial(look_again, "interface created")
        listener.on_reconnected.append(partial(look_again, "stream connected again"))
        for name in ("mesh.mtu", "mesh.persistent_keepalive", "policy"):
            self._live[name] = partial(reconcile.request_pass, "configuration reloaded")
        self._live["nat_traversal"] = traversal.exchange

        def pace() -> None:
            heartbeat.interval = self._config.heartbeat.interval.total_seconds()
            reconcile.interval = listener.poll_interval = self._config.reconcile.interval.total_seconds()
            reconcile.request("configuration reloaded")  # also ends a wait of the old length

        self._live["heartbeat"] = self._live["reconcile"] = pace
        work += telemetry.join(node, converger)
        listener.on_connected.append(telemetry.wake)
        if (trail := telemetry.trail) is not None:
            rotation.on_accepted.append(trail.mesh_key_rotated)
            persist.on_new_signing_key.append(trail.signing_key_rotated)
            listener.on_rejected.append(trail.event_rejected)
            self._front.on_secret_read.append(lambda read: trail.secret_read(*read))
        vital: list[Service] = [heartbeat, persist, drift]
        if (watchdog_seconds := systemd.watchdog_interval()) is not None:
            vital.append(Watchdog(watchdog_seconds / 3, lambda: self._notify.send("WATCHDOG=1")))
        return work, vital, persist, drift

    def _endpoint_report(
        self, uplink: Uplink, node: Node, converger: Converger, kernel: Kernel
    ) -> EndpointReport | None:
        nat = self._config.nat_traversal
        if not nat.enabled:
            return None
        refresh = nat.refresh_interval.total_seconds()
        if nat.public_endpoint:
            return EndpointReport(
                uplink, node, converger.up, converger.apply_event, *stated(nat.public_endpoint), refresh
            )
        port, timeout = self._config.mesh.listen_port, nat.timeout.total_seconds()
        discovery = Discovery(StunClient(port), look_up, kernel.local_addresses, nat.stun_servers, port, timeout)
        return EndpointReport(uplink, node, converger.up, converger.apply_event, discovery.discover, None, refresh)

    # running

    async def _run_services(self, work: list[Service], vital: list[Service], health: Health) -> None:
        """Run all until a stop signal; on return only `vital` ones still run, as `self._vital`."""

        def show() -> None:
            findings = health.findings()
            status = "degraded: " + ", ".join(f.condition.value for f in findings) if findings else "running"
            self._notify.send(f"STATUS={status}")

        health.on_change.append(show)
        working = asyncio.create_task(self._work.run(work), name="services")
        recovering = self._supervise("recovery", [self._recovery])
        self._vital = self._supervise("vital services", vital)
        self._overview.phase = Phase.RUNNING
        stop = asyncio.create_task(self._stopping.wait(), name="stop signal")
        self._notify.send("READY=1", "STATUS=running")
        log.info("plexd started", interface=self._config.mesh.interface, api=self._config.api)
        try:
            await asyncio.wait({working, recovering, self._vital, stop}, return_when=asyncio.FIRST_COMPLETED)
            for task in (working, recovering, self._vital):
                if task.done():
                    task.result()  # a FatalError of a service ends the process
        finally:
            self._overview.phase = Phase.STOPPING
            self._front.stop()
            self._notify.send("STOPPING=1", "STATUS=stopping")
            log.info("plexd stops")
            stop.cancel()
            await _cancel(recovering)
            await _cancel(working)

    def _supervise(self, group: str, services: list[Service]) -> asyncio.Task[None]:
        return asyncio.create_task(self._supervisor(group).run(services), name=group)

    def _supervisor(self, group: str) -> Supervisor:
        def on_flapping(names: frozenset[str]) -> None:
            self._flapping[group] = names
            stopped = sorted(frozenset().union(*self._flapping.values()))
            self._health.set(Condition.SUBSYSTEM_STOPPED, bool(stopped), ", ".join(stopped))

        return Supervisor(on_flapping)

    async def _stop(
        self,
        persist: Persist,
        drift: DriftReports,
        telemetry: Telemetry,
        node: Node,
        kernel: Kernel,
        control: ControlPlane,
    ) -> None:
        """Steps 3 to 8 of the stop, each with a deadline of its own; a failing one does not keep the next from it."""
        await asyncio.gather(
            _do("send reports", REPORTS_SECONDS, self._front.flush()),
            _do("deliver telemetry", TELEMETRY_SECONDS, self._finish(telemetry)),
        )
        async with _step("save snapshot", STOP_STEP_SECONDS):
            await persist.flush()
        async with _step("save drift", STOP_STEP_SECONDS):
            await drift.save()
        is_given_up = False
        if self._config.deregister_on_shutdown and self._stopping.is_set():  # no failure gives the node's place up
            async with _step("deregister", DEREGISTER_SECONDS):
                await _give_up(control)
                is_given_up = True
        if is_given_up or not self._config.mesh.keep_on_stop:
            async with _step("take the mesh down", TEAR_DOWN_SECONDS):
                key = node.identity.private_key
                await kernel.tear_down(key.public() if key is not None else None)
        if is_given_up:
            async with _step("retire the identity", STOP_STEP_SECONDS):
                if telemetry.trail is not None:
                    await telemetry.trail.node_deregistered(node.identity.node_id, node.identity.mesh_ip)
                await asyncio.to_thread(self._identities.retire, ".deregistered")
                log.info("node deregistered", node_id=node.identity.node_id)
        async with _step("end the heartbeat", STOP_STEP_SECONDS):
            await _cancel(self._vital)


def _firewall_settings(config: Config, identity: Identity) -> firewall.Settings | None:
    policy = config.policy
    if not policy.enabled:
        return None
    return firewall.Settings(
        mesh_ip=identity.mesh_ip,
        interfaces=(config.mesh.interface,),
        default=Action(policy.default),
        allow_ping=policy.allow_ping,
        guard_mesh_ip=policy.guard_mesh_ip,
        log_denied=policy.log_denied,
    )


class _Watch:
    """Has the kernel tell of changes for as long as the daemon runs."""

    def __init__(self, name: str, watch: Callable[[], Awaitable[None]]) -> None:
        self.name = name
        self._watch = watch

    async def run(self) -> None:
        await self._watch()


async def _give_up(control: ControlPlane) -> None:
    """One try. Raises ControlError."""
    try:
        await control.deregister(retry_for=0)
    except Unauthenticated:
        log.warning("control plane refuses the node's key, which counts as deregistered")


@contextlib.asynccontextmanager
async def _step(name: str, seconds: float) -> Any:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        log.error("step of the stop took too long", step=name, limit_seconds=seconds)
    except (ControlError, KernelError, OSError) as exc:
        log.error("step of the stop failed", step=name, error=str(exc))


async def _do(name: str, seconds: float, work: Coroutine[Any, Any, None]) -> None:
    """A step that goes on beside others."""
    async with _step(name, seconds):
        await work


async def _cancel(task: asyncio.Task[None], limit: float = STOP_STEP_SECONDS) -> None:
    """Cancel and wait, not for ever; what the task raised besides has been logged where it happened."""
    task.cancel()
    await asyncio.wait({task}, timeout=limit)
    if not task.done():
        log.error("services do not end", task=task.get_name(), limit_seconds=limit)
    elif not task.cancelled():
        task.exception()  # seen, so that asyncio does not complain about it


def _read_when_needed() -> None:
    """A key that nobody holds on to."""


def _innermost(task: asyncio.Task[Any]) -> str:
    """Where a task waits: the coroutine at the end of its chain of awaits."""
    awaited: Any = task.get_coro()
    while getattr(getattr(awaited, "cr_await", None), "cr_frame", None) is not None:
        awaited = awaited.cr_await
    frame = getattr(awaited, "cr_frame", None)
    return f"{frame.f_code.co_qualname}:{frame.f_lineno}" if frame is not None else "-"
