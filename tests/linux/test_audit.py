"""The kernel's audit stream: real records from the real kernel."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from plexd.audit.records import fields, parse_datagram
from plexd.errors import KernelError, NotPermitted
from plexd.linux import audit
from plexd.linux.audit import AuditStream, Overrun
from tests.linux.audit_kernel import AuditKernel, audit_kernel, can_listen

DEADLINE = 20.0


@pytest.fixture
def kernel() -> Iterator[AuditKernel]:
    if reason := can_listen():
        pytest.skip(reason)
    with audit_kernel() as made:
        yield made


def is_listening(stream: AuditStream) -> bool:
    return stream._is_listening


def text_of(item: bytes | Overrun) -> str:
    """What a program said, empty for any other record."""
    if isinstance(item, Overrun):
        return "overrun"
    record = parse_datagram(item)
    return "" if record is None else fields(record).get("said", "")


async def said(stream: AuditStream, wanted: str) -> tuple[list[str], int]:
    """What programs said in their records until `wanted`, and how often the kernel dropped some."""
    texts: list[str] = []
    async with asyncio.timeout(DEADLINE):
        while wanted not in texts:
            texts += [text for item in await stream.read() if (text := text_of(item))]
    return [text for text in texts if text != "overrun"], texts.count("overrun")


async def test_records_of_the_kernel_are_heard_in_order(kernel: AuditKernel) -> None:
    with AuditStream() as stream:
        for number in range(300):
            kernel.say(f"said={number}")
        texts, overruns = await said(stream, "299")
        assert texts == [str(number) for number in range(300)]
        assert overruns == 0


async def test_what_comes_before_anyone_reads_is_kept(kernel: AuditKernel) -> None:
    stream = AuditStream()
    kernel.say("said=early")
    with stream:
        assert (await said(stream, "early"))[0] == ["early"]


async def test_an_overrun_is_told_where_it_was(kernel: AuditKernel) -> None:
    with AuditStream(buffer_bytes=1 << 14) as stream:
        for number in range(300):  # nobody reads meanwhile: the loop stands still
            kernel.say(f"said={number}")
        kernel.say("said=last")
        heard: list[str] = []
        async with asyncio.timeout(DEADLINE):
            while "overrun" not in heard:
                heard += [text_of(item) for item in await stream.read() if text_of(item)]
        at = heard.index("overrun")
        assert heard[:at] == [str(number) for number in range(at)]  # the hole is where the marker is
        assert 0 < at < 300
        assert str(at) not in heard


async def test_a_full_queue_leaves_the_rest_to_the_kernel(kernel: AuditKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "QUEUE_DATAGRAMS", 10)
    with AuditStream() as stream:
        for number in range(100):
            kernel.say(f"said={number}")
        async with asyncio.timeout(DEADLINE):
            while is_listening(stream):  # noqa: ASYNC110 - the loop is not to turn in vain meanwhile
                await asyncio.sleep(0)
        first = [text for item in await stream.read() if (text := text_of(item))]
        assert is_listening(stream)
        texts, overruns = await said(stream, "99")
        assert first + texts == [str(number) for number in range(100)]
        assert overruns == 0


async def test_other_programs_cannot_pretend_to_be_the_kernel(kernel: AuditKernel) -> None:
    with AuditStream() as stream:
        port = stream._socket.getsockname()[0]
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, audit.NETLINK_AUDIT) as other:
            payload = b"audit(1.000:2): said=forged"
            message = (16 + len(payload)).to_bytes(4, "little") + (1121).to_bytes(2, "little") + bytes(10) + payload
            with contextlib.suppress(ConnectionRefusedError, PermissionError):  # the kernel may see to it itself
                other.sendto(message, (port, 0))
        kernel.say("said=genuine")
        assert (await said(stream, "genuine"))[0] == ["genuine"]


def test_without_the_capability_the_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := can_listen():
        pytest.skip(reason)

    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(audit.socket.socket, "bind", refuse)  # type: ignore[attr-defined]
    with pytest.raises(NotPermitted, match="CAP_AUDIT_READ"):
        AuditStream()


def test_a_namespace_of_its_own_hears_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "INITIAL_NAMESPACE_KNOB", Path("/proc/sys/net/core/of_no_namespace"))
    with pytest.raises(KernelError, match="host's network namespace"):
        AuditStream()
