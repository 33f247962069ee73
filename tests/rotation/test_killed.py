"""An agent killed with -9 at every step of a key rotation: the next one ends it, with one key that both sides know."""

from __future__ import annotations

import subprocess
import sys

from plexd.lab.nodes import NodeProcess
from tests.namespaces import marks
from tests.rotation.pair import Pair, running_pair

pytestmark = marks(seconds=300)

# what happens between the order and the end, each with the moment of death: before it begins or after it is done
STEPS = [
    ("plexd.store.identity", "IdentityStore.make_pending_key"),
    ("plexd.node.control_calls", "ControlCalls.rotate_key"),
    ("plexd.store.identity", "IdentityStore.commit_pending_key"),
    ("plexd.node.state", "Node.rotate"),
    ("plexd.linux.interface", "Interface.apply"),
    ("plexd.linux.wireguard.userspace", "UserspaceDevice.set_device"),
    ("plexd.linux.wireguard.userspace", "UserspaceDevice.renew_sessions"),
    ("plexd.store.snapshot", "SnapshotStore.save"),
]
# and at the other end, which is told of the new key by an event
STEPS_OF_THE_PEER = [
    ("plexd.node.state", "Node.fold"),
    ("plexd.linux.interface", "Interface.apply"),
    ("plexd.store.snapshot", "SnapshotStore.save"),
]
AGENT = """
import importlib, inspect, os, signal, sys
from plexd.events.dispatch import Dispatch
from plexd.store.identity import IdentityStore

module, name, moment = sys.argv[1:4]
armed = False
handle, make_pending_key = Dispatch.handle, IdentityStore.make_pending_key
# the agent has other things to apply and save, which are no step of a rotation that has not begun
begins = "rotate_keys" if name == "IdentityStore.make_pending_key" else "key made"

def note(what):
    global armed
    armed = armed or what in {begins, "peer_key_rotated"}

async def note_and_handle(self, envelope):
    note(envelope.event_type)
    await handle(self, envelope)

def make_and_note(self):
    key = make_pending_key(self)
    note("key made")
    return key

Dispatch.handle, IdentityStore.make_pending_key = note_and_handle, make_and_note
owner, method = name.split(".")
owner = getattr(importlib.import_module(module), owner)
work = getattr(owner, method)

def die_if(now):
    if now == moment and armed:
        os.kill(os.getpid(), signal.SIGKILL)

if inspect.iscoroutinefunction(work):
    async def mortal(*args, **kwargs):
        die_if("before")
        result = await work(*args, **kwargs)
        die_if("after")
        return result
else:
    def mortal(*args, **kwargs):
        die_if("before")
        result = work(*args, **kwargs)
        die_if("after")
        return result

setattr(owner, method, mortal)
from plexd.cli.main import main
sys.exit(main(sys.argv[4:]))
"""


def start_mortal(node: NodeProcess, module: str, name: str, moment: str) -> None:
    """The agent, which kills itself at that moment once the rotation has begun for it.

    A rotation of its own key has begun when the new key is on disk, that of a peer's key with the event about that key.
    """
    arguments = ("up", "--config", str(node.directory / "config.yaml"))
    with node.log.open("ab") as log:
        node._process = subprocess.Popen(
            node.namespace.command(sys.executable, "-c", AGENT, module, name, moment, *arguments),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def die_while_rotating(pair: Pair, rotated: NodeProcess, node: NodeProcess, step: tuple[str, str], moment: str) -> None:
    """`node` dies, in the rotation of its own key or in that of the other one."""
    before = pair.public_key(rotated)
    node.kill()
    pair.wait("the end of its stream", lambda: pair.ask("GET", f"/nodes/{node.name}")["streams"] == 0)
    start_mortal(node, *step, moment)
    pair.wait("the agent", lambda: node.api_socket.exists() and pair.reaches(node))
    pair.wait("its stream", lambda: pair.ask("GET", f"/nodes/{node.name}")["streams"] == 1)
    pair.order_rotation(rotated)
    pair.wait(f"death {moment} {step[1]}", lambda: not node.is_running())
    node.start()
    pair.wait("one key at both ends", pair.agree)
    if node is not rotated:
        assert pair.public_key(rotated) != before
    elif pair.public_key(node) == before:  # it died before the new key was on its disk: the order is lost with it
        assert (step[1], moment) == ("IdentityStore.make_pending_key", "before")
    pair.wait("pings", lambda: pair.reaches(node) and pair.reaches(pair.other(node)))
    assert len(pair.preshared_keys()) == 1


def test_agent_killed_at_any_step_of_a_rotation_comes_to_one_key_that_both_sides_know() -> None:
    with running_pair("plexd-rk") as pair:
        node = pair.nodes[0]
        for step in STEPS:
            for moment in ("before", "after"):
                die_while_rotating(pair, node, node, step, moment)


def test_peer_killed_at_any_step_of_learning_the_new_key_knows_it_afterwards() -> None:
    with running_pair("plexd-rk") as pair:
        rotated, node = pair.nodes
        for step in STEPS_OF_THE_PEER:
            for moment in ("before", "after"):
                die_while_rotating(pair, rotated, node, step, moment)
