"""What stops the daemon and what only degrades it, each with a sentence that says what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.plane import Plane
from tests.faults.world import MARKS, PATIENCE, PLEXD, World, wait_until

HOLD_THE_PORT = """\
import signal, socket
held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
held.bind(("", 51820))
print("bound", flush=True)
signal.pause()
"""
TOKEN = "a-token-that-nobody-knows"


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    with Plane(tmp_path) as plane:
        yield plane


def up(directory: Path, api: str, *flags: str, **environ: str) -> tuple[int, list[str]]:
    """Exit code, and the lines that are no log records."""
    config = directory / "config.yaml"
    config.write_text(
        f"api: {api}\npolicy: {{enabled: false}}\nlog_format: json\nlog_level: debug\nhostname: outcomes\n"
        f"token: {{file: {directory}/token}}\nregistration: {{retry_for: 10s}}\nmesh: {{interface: plxfnever}}\n"
        f"node_api: {{socket: {directory}/api.sock}}\n"
    )
    done = subprocess.run(
        [*PLEXD, "up", "--config", str(config), "--data-dir", str(directory / "data"), *flags],
        env={"PATH": os.environ["PATH"], **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("{")]


def test_no_token_is_6_and_names_the_places(tmp_path: Path, plane: Plane) -> None:
    code, (sentence,) = up(tmp_path, plane.url)
    assert code == 6
    for place in ("token.value", f"{tmp_path}/token", "PLEXD_BOOTSTRAP_TOKEN"):
        assert place in sentence


def test_refused_token_is_6_and_asks_for_a_new_one(tmp_path: Path, plane: Plane) -> None:
    code, (sentence,) = up(tmp_path, plane.url, PLEXD_BOOTSTRAP_TOKEN=TOKEN)
    assert code == 6
    assert "refuses the bootstrap token" in sentence
    assert "get a new one" in sentence


def test_used_token_is_6(tmp_path: Path, plane: Plane) -> None:
    token = plane.issue_token()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    joined = subprocess.run(
        [*PLEXD, "join", "--api", plane.url, "--data-dir", str(tmp_path / "first/data"), "--token-stdin"],
        env={"PATH": os.environ["PATH"], "PLEXD_HOSTNAME": "first"}, input=token, text=True, check=True,
        capture_output=True,
    )  # fmt: skip
    assert token not in joined.stdout + joined.stderr
    code, (sentence,) = up(tmp_path / "second", plane.url, PLEXD_BOOTSTRAP_TOKEN=token)
    assert code == 6
    assert "already used" in sentence
    assert token not in sentence


def test_data_directory_that_is_a_file_is_7(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    code, (sentence,) = up(tmp_path, "http://127.0.0.1:1")
    assert code == 7
    assert f"{tmp_path}/data" in sentence
    assert "data_dir" in sentence


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_data_directory_of_somebody_else_is_7(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    os.chown(tmp_path / "data", 12345, 12345)
    code, (sentence,) = up(tmp_path, "http://127.0.0.1:1")
    assert code == 7
    assert "chown" in sentence


def test_damaged_identity_without_a_token_is_7(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data/identity.json").write_text("{")
    code, (sentence,) = up(tmp_path, "http://127.0.0.1:1")
    assert code == 7
    assert "bootstrap token" in sentence


def test_unreachable_control_plane_is_8_after_the_time_configured(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again at once, so nobody listens there
    code, (sentence,) = up(tmp_path, f"http://127.0.0.1:{port}", PLEXD_BOOTSTRAP_TOKEN=TOKEN)
    assert code == 8
    assert "cannot be reached" in sentence
    assert (tmp_path / "data/private_key.pending").exists()


# --- degraded, and alive


def registered(world: World, *through: str, **environ: str) -> None:
    world.start_agent(*through, **environ)
    world.plane.wait_for("register", timeout=PATIENCE)
    (node,) = world.plane.nodes()
    world.node_id = node["id"]


def last_heartbeat(world: World) -> dict[str, Any]:
    beat: dict[str, Any] = world.plane.ask("GET", f"/nodes/{world.node_id}")["last_heartbeat"] or {}
    return beat


def is_degraded(world: World) -> bool:
    assert world.is_alive()
    return last_heartbeat(world).get("status") == "degraded"


def detail(world: World) -> str:
    return " ".join(str(line["detail"]) for line in world.said("condition raised"))


def is_degraded_by(world: World, words: str) -> None:
    """A heartbeat that comes before the first try to make an interface is degraded without a condition."""
    wait_until(f"a condition with {words}", lambda: words in detail(world))
    wait_until("a degraded heartbeat", lambda: is_degraded(world))


def still_does_everything_else(world: World) -> None:
    wait_until("the event stream is open", world.streams)
    world.wait_for_ack(world.emit_action())
    assert world.said("service failed") == []


@pytest.fixture
def busy_port(tmp_path: Path) -> Iterator[tuple[World, subprocess.Popen[str]]]:
    with World(tmp_path) as world:
        holder = subprocess.Popen(
            [*world.inside, sys.executable, "-c", HOLD_THE_PORT], stdout=subprocess.PIPE, text=True
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == "bound\n"
        yield world, holder
        holder.kill()
        holder.communicate()


class TestDegraded:
    pytestmark = MARKS

    def test_busy_port_degrades_and_heals_when_it_is_free(self, busy_port: tuple[World, subprocess.Popen[str]]) -> None:
        world, holder = busy_port
        world.put_token(world.plane.issue_token())
        registered(world)
        is_degraded_by(world, "51820")
        still_does_everything_else(world)
        holder.kill()
        wait_until("a healthy heartbeat", lambda: last_heartbeat(world).get("status") == "healthy")
        assert last_heartbeat(world)["mesh"]["listen_port"] == 51820
        assert world.end_agent() == 0

    def test_missing_program_degrades_and_is_named(self, tmp_path: Path) -> None:
        with World(tmp_path, "  backend: userspace\n  userspace_program: no-such-program") as world:
            world.put_token(world.plane.issue_token())
            registered(world)
            is_degraded_by(world, "no-such-program")
            still_does_everything_else(world)
            assert "mesh" not in last_heartbeat(world)
            assert world.end_agent() == 0

    def test_neither_wireguard_nor_tun_degrades_and_says_what_to_install(self, tmp_path: Path) -> None:
        with World(tmp_path, "  backend: userspace") as world:
            world.put_token(world.plane.issue_token())
            registered(world, "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh")
            is_degraded_by(world, "/dev/net/tun")
            still_does_everything_else(world)
            assert world.end_agent() == 0

    def test_token_of_the_environment_reaches_no_child_and_no_output(self, tmp_path: Path) -> None:
        with World(tmp_path) as world:
            token = world.plane.issue_token()
            registered(world, PLEXD_BOOTSTRAP_TOKEN=token)
            wait_until("the interface is up", lambda: world.said("interface up"))
            children = world.pids() - {world.agent_pid, world.plane.pid}
            assert children
            for pid in children:
                assert token not in Path(f"/proc/{pid}/environ").read_text(errors="replace")
            for pid in world.pids():
                assert token not in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
            assert world.end_agent() == 0
            assert token not in world.output.read_text()
