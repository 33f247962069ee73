"""Real audit records, from the kernel to the control plane."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from plexd.linux.audit import AuditStream
from tests.linux.audit_kernel import AuditKernel, audit_kernel, can_listen
from tests.telemetry.test_auditd import Life

DEADLINE = 30.0


@pytest.fixture
def kernel() -> Iterator[AuditKernel]:
    if reason := can_listen():
        pytest.skip(reason)
    with audit_kernel() as made:
        yield made


@contextlib.asynccontextmanager
async def listening(life: Life, stream: AuditStream) -> AsyncIterator[None]:
    async with life.stage:
        task = asyncio.create_task(life.audit.collect(stream))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})


async def arrived(life: Life, last: str) -> None:
    async with asyncio.timeout(DEADLINE):
        while last not in life.told:  # noqa: ASYNC110 - what arrives sets no event
            await asyncio.sleep(0.05)


async def test_a_burst_that_overruns_the_socket_is_counted_and_marked(kernel: AuditKernel, tmp_path: Path) -> None:
    life = Life(tmp_path, batch_seconds=0.1)
    async with listening(life, AuditStream(buffer_bytes=1 << 14)):
        for number in range(300):  # the loop stands still meanwhile
            kernel.say(f"n={number}")
        await arrived(life, "gap kernel_overrun")
        kernel.say("n=last")
        await arrived(life, "last")
    told = [text for text in life.told if text != "?"]
    at = told.index("gap kernel_overrun")
    assert told[:at] == [str(number) for number in range(at)]
    assert at < 300
    assert life.pipeline.counters.kernel_lost >= 1


async def test_every_record_of_a_burst_arrives_in_order(kernel: AuditKernel, tmp_path: Path) -> None:
    life = Life(tmp_path, batch_seconds=0.1)
    async with listening(life, AuditStream()):
        for number in range(2000):
            kernel.say(f"n={number}")
            if number % 100 == 0:
                await asyncio.sleep(0)
        await arrived(life, "1999")
    assert [text for text in life.told if text != "?"] == [str(number) for number in range(2000)]
    assert life.pipeline.counters.kernel_lost == 0
