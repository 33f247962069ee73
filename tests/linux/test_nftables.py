"""The door to nftables, against the kernel's own in a namespace."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from plexd.errors import FirewallUnavailable, KernelError, NotPermitted, PolicyRejected
from plexd.linux import nftables
from plexd.linux.nftables import Nftables
from plexd.mesh.address import Prefix, parse_ip
from plexd.mesh.firewall import TABLE, Settings
from plexd.mesh.policy import Action, Protocol, Rule, Side
from plexd.mesh.table_reading import fingerprint
from tests.mesh.rendering import render

DEADLINE_SECONDS = 10.0
OWN = Side(Prefix.host(parse_ip("10.100.1.1")), "n_a")
SETTINGS = Settings(parse_ip("10.100.1.1"), ("plexd0",))
BASELINE = render(SETTINGS)


def rules(count: int) -> list[Rule]:
    sources = (Side(Prefix.host(bytes([10, 1, number >> 8, number & 255]))) for number in range(count))
    return [Rule("pol", n, src, OWN, Protocol.TCP, 22, Action.ALLOW) for n, src in enumerate(sources)]


def nft(*arguments: str) -> str:
    return subprocess.run(["nft", *arguments], check=True, capture_output=True, text=True).stdout


@contextlib.asynccontextmanager
async def opened(program: str = "nft") -> AsyncIterator[Nftables]:
    door = Nftables(TABLE, program)
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            yield door
    finally:
        await door.close()


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A program to call in place of nft; the test writes it."""
    path = tmp_path / "nft"
    path.touch()
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.namespaces
@pytest.mark.usefixtures("namespace")
class TestWithTheKernel:
    @pytest.mark.parametrize("count", [0, 3, 100])
    async def test_table_is_there_when_apply_returns_and_reads_the_same_again_and_again(self, count: int) -> None:
        document = render(SETTINGS, rules(count), visible=[parse_ip("10.100.1.2")])
        async with opened() as door:
            assert await door.read_table() is None
            seen = set()
            for _ in range(3):
                await door.apply(document)
                table = await door.read_table()
                assert table is not None
                seen.add(fingerprint(table))
            assert len(seen) == 1
            await door.apply(BASELINE)
            table = await door.read_table()
            assert table is not None
            assert (fingerprint(table) in seen) is False

    async def test_apply_replaces_what_others_did_to_the_table(self) -> None:
        async with opened() as door:
            await door.apply(BASELINE)
            clean = await door.read_table()
            nft("insert", "rule", "inet", "plexd", "mesh", "accept")
            dirty = await door.read_table()
            await door.apply(BASELINE)
            again = await door.read_table()
            assert clean is not None
            assert dirty is not None
            assert again is not None
            assert fingerprint(dirty) != fingerprint(clean) == fingerprint(again)

    async def test_refused_transaction_leaves_the_table_as_it_was_and_says_why_in_one_line(self) -> None:
        async with opened() as door:
            await door.apply(render(SETTINGS, rules(100)))
            before = nft("-s", "list", "ruleset")
            broken: dict[str, Any] = {
                "nftables": [
                    *BASELINE["nftables"],
                    {"add": {"rule": {"family": "inet", "table": "plexd", "chain": "nowhere", "expr": []}}},
                ]
            }
            with pytest.raises(PolicyRejected) as refused:
                await door.apply(broken)
            assert "\n" not in str(refused.value)
            assert "No such file or directory" in str(refused.value)
            assert nft("-s", "list", "ruleset") == before

    async def test_delete_takes_the_table_and_nothing_else_and_succeeds_without_one(self) -> None:
        nft("add table inet other; add chain inet other c")
        before = nft("list", "ruleset")
        async with opened() as door:
            await door.delete_table()
            await door.apply(BASELINE)
            await door.delete_table()
            assert await door.read_table() is None
        assert nft("list", "ruleset") == before

    async def test_generation_changes_with_every_change_and_only_then(self) -> None:
        async with opened() as door:
            first = door.generation()
            await door.read_table()
            assert door.generation() == first
            await door.apply(BASELINE)
            second = door.generation()
            nft("add table ip other")
            assert len({first, second, door.generation()}) == 3

    async def test_watch_wakes_at_its_start_and_at_changes_of_our_table_however_many_rules_they_are(self) -> None:
        noticed = asyncio.Event()
        task = asyncio.create_task(nftables.watch(TABLE, lambda _: False, noticed))
        try:
            async with opened() as door:
                await noticed.wait()
                changes = (
                    door.apply(render(SETTINGS, rules(10_000))),  # more than a socket holds
                    door.apply(BASELINE),
                    asyncio.to_thread(nft, "flush", "ruleset"),
                )
                for change in changes:
                    noticed.clear()
                    await change
                    await noticed.wait()
                assert not task.done()
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def test_generation_that_is_known_wakes_nobody(self) -> None:
        noticed, told = asyncio.Event(), asyncio.Event()

        def is_known(_: int) -> bool:
            told.set()
            return True

        task = asyncio.create_task(nftables.watch(TABLE, is_known, noticed))
        async with opened() as door:
            await noticed.wait()
            noticed.clear()
            await door.apply(BASELINE)
            await told.wait()
            assert not noticed.is_set()
        task.cancel()
        await asyncio.wait({task})

    async def test_change_that_nobody_announces_is_done_when_nft_has_ended(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(nftables, "_drain", lambda _: False)
        async with opened() as door:
            await door.apply(BASELINE)
            assert await door.read_table() is not None

    def test_without_the_capability_it_says_so(self, tmp_path: Path) -> None:
        """In a process of its own, which gives up what root may do."""
        script = tmp_path / "ask.py"
        script.write_text(
            "import asyncio, sys\n"
            "from plexd.linux.nftables import Nftables\n"
            "door = Nftables('plexd')\n"
            "async def attempt(call):\n"
            "    try:\n"
            "        await call\n"
            "    except Exception as exc:\n"
            "        print(type(exc).__name__, exc)\n"
            "async def main():\n"
            "    await attempt(door.apply({'nftables': []}))\n"
            "    await attempt(door.read_table())\n"
            "    await attempt(asyncio.to_thread(door.generation))\n"
            "asyncio.run(main())\n"
        )
        command = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, str(script)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path.cwd())
        assert done.stdout.splitlines() == ["NotPermitted nftables needs the capability NET_ADMIN"] * 3


@pytest.mark.skipif(os.geteuid() != 0, reason="nftables is for root")
async def test_without_nft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nftables, "_table_handle", lambda *_: b"1")
    async with opened("no-such-nft") as door:
        for call in (door.apply(BASELINE), door.read_table(), door.delete_table()):
            with pytest.raises(FirewallUnavailable, match="no-such-nft not found: install the package nftables"):
                await call


@pytest.mark.skipif(os.geteuid() != 0, reason="nftables is for root")
@pytest.mark.parametrize(
    ("program", "error", "says"),
    [
        (b"\x7fELF of another machine", FirewallUnavailable, "cannot be run .* install the package nftables"),
        (b"#!/bin/sh\necho '{'\n", KernelError, "in a way that cannot be read"),
    ],
    ids=["no program of this machine", "another nft"],
)
async def test_program_that_is_none_is_named(
    monkeypatch: pytest.MonkeyPatch, stand_in: Path, program: bytes, error: type[KernelError], says: str
) -> None:
    monkeypatch.setattr(nftables, "_table_handle", lambda *_: b"1")
    stand_in.write_bytes(program)
    async with opened(str(stand_in)) as door:
        with pytest.raises(error, match=says) as raised:
            await door.read_table()
        assert type(raised.value) is error


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.EPROTONOSUPPORT, FirewallUnavailable),
        (errno.EAFNOSUPPORT, FirewallUnavailable),
        (errno.EINVAL, FirewallUnavailable),
        (errno.EOPNOTSUPP, FirewallUnavailable),
        (errno.EPERM, NotPermitted),
        (errno.ENOBUFS, KernelError),
    ],
)
async def test_what_the_kernel_answers_becomes_what_to_do(
    monkeypatch: pytest.MonkeyPatch, code: int, error: type[KernelError]
) -> None:
    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(nftables, "NetlinkSocket", refuse)
    async with opened() as door:
        for call in (door.apply(BASELINE), door.read_table(), door.delete_table()):
            with pytest.raises(KernelError) as raised:
                await call
            assert type(raised.value) is error
        with pytest.raises(error):
            door.generation()


@pytest.mark.namespaces
@pytest.mark.usefixtures("namespace")
class TestWithAStandIn:
    async def test_nft_that_does_not_end_is_ended(self, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stand_in.write_text("#!/bin/sh\nexec sleep 1000\n")
        monkeypatch.setattr(nftables, "TIMEOUT_SECONDS", 0.2)
        async with opened(str(stand_in)) as door:
            with pytest.raises(KernelError, match="did not end"):
                await door.apply(BASELINE)

    async def test_long_complaint_is_cut_and_bytes_that_are_no_text_are_replaced(self, stand_in: Path) -> None:
        stand_in.write_text(
            "#!/bin/sh\nprintf 'Error:\\n  \\377 ' >&2; head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1\n"
        )
        async with opened(str(stand_in)) as door:
            with pytest.raises(PolicyRejected) as refused:
                await door.apply(BASELINE)
            assert str(refused.value).startswith("Error: \ufffd xxx")
            assert len(str(refused.value)) == nftables.MAX_MESSAGE

    def test_nft_gets_nothing_of_our_environment(self, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PLEXD_SECRET", "s")
        stand_in.write_text("#!/bin/sh\ntr '\\0' '\\n' </proc/self/environ >&2; exit 1\n")

        async def scenario() -> str:
            async with opened(str(stand_in)) as door:
                with pytest.raises(PolicyRejected) as refused:
                    await door.apply(BASELINE)
                return str(refused.value)

        said = {word.partition("=")[0] for word in asyncio.run(scenario()).split()}
        assert {"PATH", "LC_ALL"} <= said <= {"PATH", "LC_ALL", "PWD", "_", "SHLVL", "OLDPWD"}
