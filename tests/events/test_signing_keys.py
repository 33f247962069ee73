"""Whose signature counts: keys come by event and by state, survive restarts, and end on time, on disk too."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from nacl.signing import SigningKey
from structlog.testing import capture_logs

from plexd.events.dispatch import Dispatch
from plexd.events.listener import Listener
from plexd.events.state import StateEvents
from plexd.mesh.desired import SigningKeys
from plexd.node.health import Health
from plexd.node.persist import Persist
from plexd.node.state import Node
from plexd.store.files import DataDirectory
from plexd.store.identity import IdentityStore
from plexd.store.snapshot import SnapshotStore
from plexd.wire.envelope import Envelope, Verifier
from plexd.wire.times import format_time
from tests.node_harness import (
    EPOCH,
    FOREVER,
    NEW_KEY,
    OLD_KEY,
    STRANGER,
    Asked,
    Step,
    Streams,
    make_identity,
    middle,
    own_node,
    public,
    send,
    signing_text,
    state_of,
    unix_time,
)
from tests.virtual_time import run_virtual

pytestmark = pytest.mark.virtual_time

END = 3600.0  # of the transition, in the loop's time
BOTH = SigningKeys(public(NEW_KEY), public(OLD_KEY), EPOCH + END)


class Stage:
    """What a daemon makes of the keys on its disk, with a stream of events; `heard` are those that were believed."""

    def __init__(self, path: Path, script: Callable[[int], Sequence[Step]]) -> None:
        self.directory = DataDirectory(path)
        self.identities = IdentityStore(self.directory)
        identity = make_identity()
        cached = SnapshotStore(self.directory).load(identity.node_id)
        self.node = Node(identity, cached.desired, cached.fetched_at, Health())
        self.node.adopt_signing_keys(self.identities.load_signing_keys())
        self.persist = Persist(self.node, SnapshotStore(self.directory), self.identities)
        self.pulls = Asked()
        self.streams = Streams(script)
        self.heard: list[str] = []
        self.dispatch = Dispatch(own_node, self.pulls, unix_time)
        state = StateEvents(self.node, _applied, self.pulls, self.persist.save_signing_keys, self.persist.save_entries)
        self.dispatch.add(state.component().events)
        self.listener = Listener(
            self.streams, self.node, Verifier(), self._handle, self.pulls, Health(), 60.0, unix_time, middle
        )

    async def _handle(self, event: Envelope) -> None:
        self.heard.append(event.event_id)
        await self.dispatch.handle(event)

    async def run(self, seconds: float, *passes: float) -> None:
        """`passes` are when the reconcile loop comes by, as it does each minute with or without a control plane."""
        tasks = [asyncio.create_task(service.run()) for service in (self.listener, self.persist)]
        for when in passes:
            asyncio.get_running_loop().call_at(when, lambda: self.node.expire_signing_key(unix_time()))
        await asyncio.sleep(seconds)
        for task in tasks:
            assert not task.done(), task
            task.cancel()
        await asyncio.wait(tasks)
        self.directory.close()


async def _applied() -> bool:
    return True


def on_stage(
    path: Path, seconds: float, *steps: Step, passes: Sequence[float] = (),
    prepare: Callable[[Stage], Awaitable[None] | None] = lambda _: None,
) -> Stage:  # fmt: skip
    async def main() -> Stage:
        stage = Stage(path, lambda n: [*steps, FOREVER] if n == 1 else [FOREVER])
        if (preparation := prepare(stage)) is not None:
            await preparation
        await stage.run(seconds, *passes)
        return stage

    return run_virtual(main())


def on_disk(path: Path) -> SigningKeys | None:
    directory = DataDirectory(path)
    try:
        return IdentityStore(directory).load_signing_keys()
    finally:
        directory.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory with the old key."""
    keep(tmp_path, SigningKeys(public(OLD_KEY)))
    return tmp_path


def keep(path: Path, keys: SigningKeys) -> None:
    directory = DataDirectory(path)
    IdentityStore(directory).save_signing_keys(keys)
    directory.close()


def rotation(key: SigningKey = OLD_KEY) -> Callable[[], bytes]:
    end = format_time(EPOCH + END)
    payload = {"current": signing_text(NEW_KEY), "previous": signing_text(OLD_KEY), "transition_expires": end}
    return send("signing_key_rotated", payload, event_id="rotation", key=key)


def each(moment: str) -> list[Step]:
    """An event of each of the two signers."""
    keys = {"old": OLD_KEY, "new": NEW_KEY}
    return [send("policy_updated", key=key, event_id=f"{name} {moment}") for name, key in keys.items()]


# the listener gives up on a silent stream after 90 s
def silence(seconds: float) -> list[Step]:
    return [60.0, b": keepalive\n\n"] * int(seconds // 60)


def test_rotation_by_event_adds_the_new_key_and_ends_the_old_one_on_time(data: Path) -> None:
    stage = on_stage(
        data, END + 100, *each("before")[:1], 1.0, rotation(), 1.0, *each("within"), *silence(END), *each("after"),
        passes=range(60, 3700, 60),
    )  # fmt: skip
    assert stage.heard == ["old before", "rotation", "old within", "new within", "new after"]
    assert stage.node.desired.signing_keys == SigningKeys(public(NEW_KEY))
    assert on_disk(data) == SigningKeys(public(NEW_KEY))


def test_rotation_of_a_stranger_or_of_a_key_to_come_changes_nothing(data: Path) -> None:
    stage = on_stage(data, 10, rotation(key=STRANGER), rotation(key=NEW_KEY), 1.0, *each("later"))
    assert stage.heard == ["old later"]
    assert on_disk(data) == SigningKeys(public(OLD_KEY))


def test_restart_within_the_transition_believes_both_until_its_end(tmp_path: Path) -> None:
    keep(tmp_path, BOTH)
    stage = on_stage(
        tmp_path, END + 100, *each("within"), *silence(END), *each("after"), passes=range(60, 3700, 60)
    )  # fmt: skip
    assert stage.heard == ["old within", "new within", "new after"]
    assert on_disk(tmp_path) == SigningKeys(public(NEW_KEY))


def test_transition_that_ended_while_the_node_was_off_is_over(tmp_path: Path) -> None:
    keep(tmp_path, BOTH._replace(previous_until=EPOCH - 1))
    stage = on_stage(tmp_path, 10, *each("at once"), passes=[5.0])
    assert stage.heard == ["new at once"]
    assert on_disk(tmp_path) == SigningKeys(public(NEW_KEY))


async def test_node_without_a_key_believes_nobody_until_a_state_brings_one(tmp_path: Path) -> None:
    missed = send("policy_updated", key=NEW_KEY, event_id="missed", sse_id="1")
    stage = Stage(tmp_path, lambda n: [missed, *each("early"), FOREVER] if n == 1 else [missed, FOREVER])
    state = state_of(signing_keys=SigningKeys(public(NEW_KEY)))
    asyncio.get_running_loop().call_at(20, lambda: stage.node.replace(state, unix_time()))
    await stage.run(30)
    assert stage.heard == ["missed"]
    assert len(stage.streams.attempts) == 2
    assert "bad signature" in stage.pulls.reasons
    assert on_disk(tmp_path) == SigningKeys(public(NEW_KEY))


def test_state_may_change_the_end_of_the_transition_and_take_the_old_key_back(tmp_path: Path) -> None:
    keep(tmp_path, BOTH)

    async def main() -> list[SigningKeys | None]:
        stage = Stage(tmp_path, lambda _: [FOREVER])
        seen: list[SigningKeys | None] = []
        for keys in (BOTH._replace(previous_until=EPOCH + 50), None, SigningKeys(public(NEW_KEY))):
            stage.node.replace(state_of(signing_keys=keys), unix_time())
            seen.append(stage.node.desired.signing_keys)
        stage.directory.close()
        return seen

    shorter = BOTH._replace(previous_until=EPOCH + 50)
    assert run_virtual(main()) == [shorter, shorter, SigningKeys(public(NEW_KEY))]  # absent is no statement


def test_disk_that_refuses_new_keys_does_not_keep_them_from_counting_and_gets_them_later(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = IdentityStore.save_signing_keys
    refusals = iter([True] * 3)

    def refuse(store: IdentityStore, keys: SigningKeys) -> None:
        if next(refusals, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(store, keys)

    monkeypatch.setattr(IdentityStore, "save_signing_keys", refuse)
    with capture_logs() as lines:
        stage = on_stage(data, 60, rotation(), 1.0, *each("within"))
    assert stage.heard == ["rotation", "old within", "new within"]
    assert [line["log_level"] for line in lines if line["event"] == "signing keys not saved"] == ["error"]
    assert on_disk(data) == BOTH


def test_every_change_is_told_with_the_beginnings_of_the_keys_and_its_source(data: Path) -> None:
    def then_by_state(stage: Stage) -> None:
        state = state_of(signing_keys=SigningKeys(public(STRANGER)))
        asyncio.get_running_loop().call_at(END + 60, lambda: stage.node.replace(state, unix_time()))

    with capture_logs() as lines:
        on_stage(data, END + 100, rotation(), *silence(END + 60), passes=[END + 1], prepare=then_by_state)
    old, new, other = (signing_text(key)[:8] for key in (OLD_KEY, NEW_KEY, STRANGER))
    told = [line for line in lines if line["event"] == "signing keys changed"]
    assert [line["log_level"] for line in told] == ["info"] * 3
    shown = [
        (line["source"], line["was_current"], line["was_previous"], line["current"], line["previous"]) for line in told
    ]
    assert shown == [
        ("event", old, "", new, old),
        ("transition over", new, old, new, ""),
        ("state", new, "", other, ""),
    ]
    assert signing_text(NEW_KEY) not in str(told)
