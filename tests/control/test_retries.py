"""Who tries again, when, and for how long; in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

import httpx
import pytest
from pydantic import SecretStr

from plexd.errors import ControlError, Forbidden, NotFound, RateLimited, Transient
from plexd.wire import endpoints, models
from plexd.wire.endpoints import Endpoint, Retry
from tests.control.rawserver import Client
from tests.virtual_time import run_virtual

pytestmark = pytest.mark.virtual_time

CLOSED = models.TunnelClosed(reason="expired", duration="12m4s", timestamp="2026-03-01T12:00:00Z")
ACK = models.ExecutionAck(execution_id="ex-1", status="rejected", reason="actions_disabled")
CAPABILITIES = models.CapabilitiesPayload(builtin_actions=(), hooks=())
ROTATION = models.KeyRotateRequest(node_id="n_7f3a", new_public_key="k")
REGISTRATION = models.RegisterRequest(token=SecretStr("a token"), public_key="k", hostname="h")

Answers = Sequence[int | tuple[int, Mapping[str, str]]]


class Script:
    """Answers with one status after the other, the last one for ever, and notes when it was asked."""

    def __init__(self, answers: Answers) -> None:
        self.times: list[float] = []
        self._answers = answers

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        given = self._answers[min(len(self.times), len(self._answers) - 1)]
        self.times.append(asyncio.get_running_loop().time())
        status, headers = given if isinstance(given, tuple) else (given, {})
        return httpx.Response(status, headers=headers, content=b"{}")

    @property
    def waits(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


def upper(_: float, high: float) -> float:
    return high


def middle(low: float, high: float) -> float:
    return (low + high) / 2


def run(
    answers: Answers,
    call: Callable[[Client], Awaitable[object]],
    uniform: Callable[[float, float], float] = middle,
    end_after: float | None = None,
) -> tuple[Script, Exception | None]:
    """What was asked when, and how the call ended; None when it succeeded or was cut off after `end_after` seconds."""
    script = Script(answers)

    async def main() -> Exception | None:
        client = Client("http://127.0.0.1:1", uniform=uniform, transport=httpx.MockTransport(script))
        try:
            async with asyncio.timeout(end_after):
                await call(client)
        except TimeoutError:
            return None
        except ControlError as exc:
            return exc
        return None

    return script, run_virtual(main())


def test_registration_backs_off_and_ends_with_its_time() -> None:
    script, error = run([500], lambda client: client.plane.register(REGISTRATION, retry_for=300.0))
    assert script.waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert isinstance(error, Transient)
    assert error.status == 500


def test_registration_makes_no_try_that_would_start_after_its_time() -> None:
    script, _ = run([500], lambda client: client.plane.register(REGISTRATION, retry_for=62.9))
    assert script.times == [0, 1, 3, 7, 15, 31]


def test_delays_are_spread_by_a_quarter() -> None:
    script, _ = run([500], lambda client: client.plane.register(REGISTRATION, retry_for=20.0), uniform=upper)
    assert script.waits == [1.25, 2.5, 5.0, 10.0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422])
def test_refused_registration_is_not_repeated(status: int) -> None:
    script, error = run([status], lambda client: client.plane.register(REGISTRATION, retry_for=300.0))
    assert len(script.times) == 1
    assert isinstance(error, ControlError)
    assert error.status == status


def test_acknowledgement_is_tried_four_times() -> None:
    script, error = run([503], lambda client: client.plane.ack(ACK), uniform=upper)
    assert script.times == [0, 1, 3, 7]
    assert isinstance(error, Transient)


def test_deregistration_is_tried_three_times() -> None:
    script, error = run([503], lambda client: client.plane.deregister())
    assert script.times == [0, 1, 3]
    assert isinstance(error, Transient)


def test_deregistration_at_shutdown_is_tried_once() -> None:
    script, error = run([503], lambda client: client.plane.deregister(retry_for=0))
    assert script.times == [0]
    assert isinstance(error, Transient)


@pytest.mark.parametrize("status", [200, 204, 404, 410])
def test_unknown_node_is_deregistered(status: int) -> None:
    _, error = run([status], lambda client: client.plane.deregister())
    assert error is None


@pytest.mark.parametrize("status", [400, 403, 405, 501])
def test_deregistration_can_be_refused(status: int) -> None:
    script, error = run([status], lambda client: client.plane.deregister())
    assert len(script.times) == 1
    assert error is not None


def test_capabilities_are_offered_without_end_up_to_five_minutes_apart() -> None:
    script, _ = run([500], lambda client: client.plane.put_capabilities(CAPABILITIES), end_after=86_400.0)
    assert script.waits[:10] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]
    assert set(script.waits[9:]) == {300}


def test_key_rotation_is_repeated_without_end_and_ends_with_an_answer() -> None:
    script, error = run([500] * 50 + [200], lambda client: client.plane.rotate_keys(ROTATION))
    assert error is None
    assert len(script.times) == 51
    assert max(script.waits) == 60


def test_tunnel_end_is_reported_for_five_minutes() -> None:
    script, error = run([500], lambda client: client.plane.tunnel_closed("s-1", CLOSED))
    assert script.times[-1] <= 300
    assert len(script.times) == 10
    assert isinstance(error, Transient)


@pytest.mark.parametrize("endpoint", [e for e in endpoints.ENDPOINTS if e.retry in {Retry.NEXT_TIME, Retry.REPORT}])
def test_loops_that_come_round_again_are_not_held_up(endpoint: Endpoint) -> None:
    if endpoint is endpoints.SECRET:
        script, error = run([503], lambda client: client.plane.call(endpoint, key="k"))
    else:
        script, error = run([503], lambda client: client.plane.call(endpoint))
    assert len(script.times) == 1
    assert isinstance(error, Transient)


def test_retry_after_is_waited_for_and_spread_upwards_only() -> None:
    later = {"Retry-After": "100"}
    script, _ = run([(503, later), (429, later), 500, 200], lambda client: client.plane.rotate_keys(ROTATION), upper)
    assert script.waits == [125, 125, 5]  # the refused tries counted for the backoff


def test_retry_after_without_spread_is_kept_exactly() -> None:
    def lower(low: float, _: float) -> float:
        return low

    script, _ = run([(429, {"Retry-After": "7"}), 200], lambda client: client.plane.rotate_keys(ROTATION), lower)
    assert script.waits == [7]


def test_retry_after_beyond_the_time_ends_a_registration_at_once() -> None:
    script, error = run(
        [(429, {"Retry-After": "3000"})], lambda client: client.plane.register(REGISTRATION, retry_for=300.0)
    )
    assert len(script.times) == 1
    assert isinstance(error, RateLimited)
    assert error.retry_after == 3000.0


def test_a_wait_ends_at_once_when_cancelled() -> None:
    script, _ = run([(503, {"Retry-After": "3600"})], lambda client: client.plane.rotate_keys(ROTATION), end_after=2.5)
    assert script.times == [0]


async def test_lost_connections_are_repeated_like_statuses() -> None:
    tries = 0

    async def fail(request: httpx.Request) -> httpx.Response:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, content=b'{"updated_peers":[]}')

    client = Client("http://127.0.0.1:1", transport=httpx.MockTransport(fail))
    await client.plane.rotate_keys(ROTATION)
    assert tries == 4


def test_forbidden_ends_an_endless_call() -> None:
    script, error = run([500, 403], lambda client: client.plane.rotate_keys(ROTATION))
    assert len(script.times) == 2
    assert isinstance(error, Forbidden)


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_extension_that_is_not_there_is_left_alone_for_an_hour(status: int) -> None:
    script = Script([status, status, 204])
    client = Client("http://127.0.0.1:1", transport=httpx.MockTransport(script))
    for _ in range(3):
        with pytest.raises(NotFound):
            await client.plane.ping()
    assert len(script.times) == 1
    with pytest.raises(NotFound):  # another extension is asked for itself
        await client.plane.tunnel_closed("s-1", CLOSED)
    assert len(script.times) == 2
    await asyncio.sleep(3599)
    with pytest.raises(NotFound):
        await client.plane.ping()
    assert len(script.times) == 2
    await asyncio.sleep(1)
    await client.plane.ping()
    assert len(script.times) == 3


async def test_missing_node_is_no_missing_feature() -> None:
    script = Script([404])
    client = Client("http://127.0.0.1:1", transport=httpx.MockTransport(script))
    for _ in range(2):
        with pytest.raises(NotFound):
            await client.plane.state()
    assert len(script.times) == 2
