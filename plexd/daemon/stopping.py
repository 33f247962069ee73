"""How a daemon stops: the steps in their order, each with a deadline of its own (docs/contract/lifecycle.md §12).

One that fails or takes too long does not keep the next from being taken.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable

from plexd.control import ControlPlane
from plexd.daemon.composition import Agent, Context, Deliveries
from plexd.errors import ControlError, KernelError, Unauthenticated
from plexd.log import get_logger
from plexd.runtime.waiting import unless_set

log = get_logger("daemon")

STEP_SECONDS = 5.0
REPORTS_SECONDS = 3.0
DEREGISTER_SECONDS = 10.0
TEAR_DOWN_SECONDS = 10.0
TELEMETRY_SECONDS = 6.0  # 5 to deliver, then positions are written


async def stop(
    agent: Agent,
    context: Context,
    deliveries: Deliveries,
    vital: asyncio.Task[None],
    telemetry_ends: Awaitable[None],
    hurrying: asyncio.Event,
    *,
    is_asked: bool,
) -> None:
    """Steps 3 to 8, for when the work has ended; `vital` runs until the last. No failure gives the node's place up.

    `hurrying` ends the waiting of step 3: what is not delivered is kept for the next start.
    """
    config, agent_audit, identity = context.configuration.current, deliveries.telemetry.trail, agent.node.identity
    await asyncio.gather(
        within(REPORTS_SECONDS, "send reports", unless_set(hurrying, context.api_server.flush())),
        within(TELEMETRY_SECONDS, "deliver telemetry", telemetry_ends),
    )
    async with _step("save snapshot", STEP_SECONDS):
        await agent.persist.flush()
    async with _step("save drift", STEP_SECONDS):
        await agent.drift.save()
    is_given_up = False
    if config.deregister_on_shutdown and is_asked:
        async with _step("deregister", DEREGISTER_SECONDS):
            await _give_up(deliveries.control)
            is_given_up = True
    if is_given_up or not config.mesh.keep_on_stop:
        async with _step("take the mesh down", TEAR_DOWN_SECONDS):
            key = identity.private_key
            await agent.kernel.tear_down(key.public() if key is not None else None)
    if is_given_up:
        async with _step("retire the identity", STEP_SECONDS):
            await agent_audit.node_deregistered(identity.node_id, identity.mesh_ip)
            await asyncio.to_thread(context.identities.retire, ".deregistered")
            log.info("node deregistered", node_id=identity.node_id)
    async with _step("end the heartbeat", STEP_SECONDS):
        await cancel(vital)


async def within(seconds: float, name: str, work: Awaitable[None]) -> None:
    """A step that goes on beside others, or alone."""
    async with _step(name, seconds):
        await work


async def cancel(task: asyncio.Task[None], limit: float = STEP_SECONDS) -> None:
    """Cancel and wait, not for ever; what the task raised besides has been logged where it happened."""
    task.cancel()
    await asyncio.wait({task}, timeout=limit)
    if not task.done():
        log.error("services do not end", task=task.get_name(), limit_seconds=limit)
    elif not task.cancelled():
        task.exception()  # seen, so that asyncio does not complain about it


@contextlib.asynccontextmanager
async def _step(name: str, seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        log.error("step of the stop took too long", step=name, limit_seconds=seconds)
    except (ControlError, KernelError, OSError) as exc:
        log.error("step of the stop failed", step=name, error=str(exc))


async def _give_up(control: ControlPlane) -> None:
    """One try. Raises ControlError."""
    try:
        await control.deregister(retry_for=0)
    except Unauthenticated:
        log.warning("control plane refuses the node's key, which counts as deregistered")
