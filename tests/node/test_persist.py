"""What is kept on disk, and what is told of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from plexd.mesh.desired import Desired, SigningKeys
from plexd.node.health import Health
from plexd.node.persist import Persist
from tests.node_harness import make_node
from tests.virtual_time import run_virtual

OLD, NEW = bytes([1] * 32), bytes([2] * 32)


@dataclass
class Disk:
    steps: list[str] = field(default_factory=list)

    def save(self, node_id: str, desired: Desired, fetched_at: float) -> None:
        self.steps.append("snapshot")

    def save_entries(self, desired: Desired) -> None:
        self.steps.append("entries")

    def save_signing_keys(self, keys: SigningKeys) -> None:
        self.steps.append(f"saved {keys.current[0]}")


def told(known: SigningKeys | None, *sets: SigningKeys) -> list[str]:
    async def main() -> list[str]:
        disk = Disk()
        node = make_node(health=Health())
        node.desired = replace(node.desired, signing_keys=known)
        persist = Persist(node, disk, disk)

        async def tell(key: bytes, event_id: str) -> None:
            disk.steps.append(f"told {key[0]} {event_id}".rstrip())

        persist.on_new_signing_key.append(tell)
        for number, keys in enumerate(sets):
            await persist.save_signing_keys(keys, f"ev-{number}" if number else "")
        return disk.steps

    return run_virtual(main())


def test_a_new_signing_key_is_told_before_it_is_saved() -> None:
    assert told(SigningKeys(OLD), SigningKeys(NEW, OLD, 9.0)) == ["told 2", "saved 2"]


def test_the_event_that_brought_a_key_is_told_with_it() -> None:
    steps = told(SigningKeys(OLD), SigningKeys(NEW, OLD, 9.0), SigningKeys(OLD, NEW, 9.0))
    assert steps == ["told 2", "saved 2", "told 1 ev-1", "saved 1"]


def test_the_first_key_and_the_end_of_an_old_one_are_no_rotation() -> None:
    assert told(None, SigningKeys(OLD)) == ["saved 1"]
    assert told(SigningKeys(NEW, OLD, 9.0), SigningKeys(NEW)) == ["saved 2"]
