"""When to try a call again, and when to give up (docs/contract/wire.md §5). tenacity does the repeating."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import repeat

import tenacity

from plexd.errors import Transient
from plexd.log import get_logger
from plexd.runtime.backoff import Backoff, Uniform, requested_delay
from plexd.wire.endpoints import Endpoint, Retry

log = get_logger("control")

STANDARD_CAP_SECONDS = 60.0
SLOW_CAP_SECONDS = 300.0
CALLBACK_SECONDS = 300.0

# the waits between a fixed number of tries
_FIXED: dict[Retry, tuple[float, ...]] = {
    Retry.DEREGISTRATION: (1.0, 2.0),
    Retry.ACKNOWLEDGEMENT: (1.0, 2.0, 4.0),
}
_STANDARD: dict[Retry, float] = {
    Retry.REGISTRATION: STANDARD_CAP_SECONDS,
    Retry.ENDLESS: STANDARD_CAP_SECONDS,
    Retry.ENDLESS_SLOW: SLOW_CAP_SECONDS,
    Retry.CALLBACK: STANDARD_CAP_SECONDS,
}


def retrying(endpoint: Endpoint, uniform: Uniform, retry_for: float | None = None) -> tenacity.AsyncRetrying:
    """Repeats a call as the endpoint's policy says; raises what the last try raised.

    Only Transient is tried again. Tries end when the next one would start later than `retry_for` seconds after the
    first; with 0 there is one try. None leaves it to the policy. A policy that is somebody else's business gives one
    try.
    """
    delays = _delays(endpoint.retry, uniform)
    if retry_for is None and endpoint.retry is Retry.CALLBACK:
        retry_for = CALLBACK_SECONDS
    started = asyncio.get_running_loop().time()

    def wait(state: tenacity.RetryCallState) -> float:
        delay = next(delays, None)
        if delay is None:
            return float("inf")
        error = state.outcome.exception() if state.outcome is not None else None
        return max(delay, requested_delay(error, uniform)) if isinstance(error, Transient) else delay

    def stop(state: tenacity.RetryCallState) -> bool:
        if state.upcoming_sleep == float("inf"):
            return True
        elapsed = asyncio.get_running_loop().time() - started
        return retry_for is not None and elapsed + state.upcoming_sleep > retry_for

    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(Transient),
        wait=wait,
        stop=stop,
        before_sleep=_log_wait(endpoint.name),
        reraise=True,
    )


def _delays(policy: Retry, uniform: Uniform) -> Iterator[float]:
    if policy in _STANDARD:
        backoff = Backoff(1.0, _STANDARD[policy], uniform)
        return (backoff.next() for _ in repeat(None))
    return iter(_FIXED.get(policy, ()))


def _log_wait(name: str) -> Callable[[tenacity.RetryCallState], None]:
    def log_wait(state: tenacity.RetryCallState) -> None:
        failures = state.attempt_number
        if failures == 1 or failures % 10 == 0:
            error = state.outcome.exception() if state.outcome is not None else None
            log.warning(
                "call failed, waiting to try again",
                call=name,
                failures=failures,
                error=str(error),
                delay_seconds=round(state.upcoming_sleep, 1),
            )

    return log_wait
