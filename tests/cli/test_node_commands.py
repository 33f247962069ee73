"""`up`, `join`, `down`, `deregister` as typed: what they print and how they end. The control plane is the lab's."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from plexd.store.files import DataDirectory

PLEXD = Path(sys.executable).with_name("plexd")
TOKEN = "token-for-the-tests"
Start = Callable[..., "subprocess.Popen[str]"]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes network interfaces, or becomes somebody else")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[str]:
    """The URL of a lab control plane that accepts TOKEN."""
    process = subprocess.Popen(
        [PLEXD, "lab", "controlplane", "--http", "--listen", "127.0.0.1:0", "--token", TOKEN],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    url = next(line.split()[1] for line in process.stdout if line.startswith("url:"))
    yield url
    process.terminate()
    process.communicate(timeout=20)


@pytest.fixture
def nowhere() -> Iterator[str]:
    """A URL where connections are accepted and never answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"data_dir: {tmp_path}/data\ntoken: {{file: {tmp_path}/token}}\npolicy: {{enabled: false}}\n"
        f"mesh: {{interface: plexd-clitest}}\nhostname: cli-test\nnode_api: {{socket: {tmp_path}/api.sock}}\n"
    )
    path.chmod(0o640)
    return path


@pytest.fixture
def start(config: Path) -> Start:
    def start(*arguments: str, **environ: str) -> subprocess.Popen[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PLEXD")}
        return subprocess.Popen(
            [PLEXD, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**clean, "PLEXD_CONFIG": str(config), **environ},
        )

    return start


def finish(process: "subprocess.Popen[str]", stdin: str = "") -> tuple[int, str, str]:
    stdout, stderr = process.communicate(stdin, timeout=60)
    assert "Traceback" not in stderr, stderr
    assert TOKEN not in stdout + stderr
    return process.returncode, stdout, stderr


# join


def test_join_prints_who_the_node_is_and_repeats_it_without_a_call(start: Start, api: str, tmp_path: Path) -> None:
    code, stdout, stderr = finish(start("join", "--token-stdin", "--api", api), TOKEN + "\n")
    assert code == 0, stderr
    node_id, mesh_ip = (line.split(": ")[1] for line in stdout.splitlines())
    assert stdout == f"node_id: {node_id}\nmesh_ip: {mesh_ip}\n"
    identity = json.loads((tmp_path / "data" / "identity.json").read_text())
    assert (identity["node_id"], identity["mesh_ip"]) == (node_id, mesh_ip)

    again = start("join", "--json", "--api", "https://127.0.0.1:1")  # nobody there
    code, stdout, stderr = finish(again)
    assert code == 0
    assert json.loads(stdout) == {"node_id": node_id, "mesh_ip": mesh_ip, "already_registered": True}
    assert "already registered" in stderr.splitlines()


def test_join_takes_the_token_from_the_file_named_and_removes_it(start: Start, api: str, tmp_path: Path) -> None:
    file = tmp_path / "other-token"
    file.touch(0o600)
    file.write_text(TOKEN)
    code, _, stderr = finish(start("join", "--token-file", str(file), "--api", api))
    assert code == 0, stderr
    assert not file.exists()


def test_empty_standard_input_is_no_token_source(start: Start, api: str) -> None:
    code, _, stderr = finish(start("join", "--token-stdin", "--api", api, PLEXD_BOOTSTRAP_TOKEN=TOKEN), " \n")
    assert code == 0, stderr


@pytest.mark.parametrize("token", ["x" * 513, "sch\xf6n"])
def test_join_refuses_what_is_no_token(start: Start, token: str) -> None:
    code, stdout, stderr = finish(start("join", "--token-stdin", "--api", "https://127.0.0.1:1"), token)
    assert (code, stdout) == (1, "")
    assert stderr.splitlines()[-1].startswith("plexd: the token on standard input")


def test_refused_token_is_1_for_join(start: Start, api: str) -> None:
    code, stdout, stderr = finish(start("join", "--token-stdin", "--api", api), "wrong-token")
    assert (code, stdout) == (1, "")
    assert stderr.splitlines()[-1].startswith("plexd: ")
    assert "wrong-token" not in stderr


def test_no_token_is_1_for_join_and_6_for_up(start: Start, tmp_path: Path) -> None:
    for command, expected in (("join", 1), ("up", 6)):
        code, _, stderr = finish(start(command, "--api", "https://127.0.0.1:1"))
        assert code == expected
        last = stderr.splitlines()[-1]
        assert last.startswith("plexd: no bootstrap token")
        for source in ("token.value", str(tmp_path / "token"), "PLEXD_BOOTSTRAP_TOKEN"):
            assert source in last


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_join_is_130(start: Start, nowhere: str, tmp_path: Path, number: signal.Signals) -> None:
    process = start("join", "--api", nowhere, PLEXD_BOOTSTRAP_TOKEN=TOKEN)
    pending = tmp_path / "data" / "private_key.pending"
    deadline = time.monotonic() + 30
    while not pending.exists():  # written before the first request
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    code, stdout, _ = finish(process)
    assert (code, stdout) == (130, "")
    assert not (tmp_path / "data" / "identity.json").exists()


# up


@pytest.mark.parametrize("command", ["up", "run", "join"])
def test_missing_api_is_5_and_names_the_ways_to_set_it(start: Start, command: str) -> None:
    code, stdout, stderr = finish(start(command))
    assert (code, stdout) == (5, "")
    for way in ("--api", "PLEXD_API", "`api: https://...`"):
        assert way in stderr


def test_missing_file_is_5(start: Start, tmp_path: Path) -> None:
    for command in ("up", "join", "down", "deregister"):
        code, _, stderr = finish(start(command, "--config", str(tmp_path / "none")))
        assert (code, stderr) == (5, f"{tmp_path}/none: the configuration file does not exist\n")


def test_second_daemon_on_a_data_directory_is_7_and_join_beside_a_daemon_is_1(start: Start, tmp_path: Path) -> None:
    held = DataDirectory(tmp_path / "data")
    try:
        for command, expected in (("up", 7), ("join", 1)):
            process = start(command, "--api", "https://127.0.0.1:1", PLEXD_BOOTSTRAP_TOKEN=TOKEN)
            code, _, stderr = finish(process)
            assert code == expected
            assert str(tmp_path / "data") in stderr.splitlines()[-1]
    finally:
        held.close()


def test_error_has_a_priority_under_systemd(config: Path) -> None:
    reading, writing = os.pipe()
    status = os.fstat(writing)
    process = subprocess.Popen(
        [PLEXD, "up", "--config", config],
        stderr=writing,
        env={**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
    )
    os.close(writing)
    with os.fdopen(reading) as stderr:
        assert stderr.read().startswith("<3>api: is not set")
    assert process.wait(60) == 5


# down, deregister


@needs_root
def test_nothing_to_take_down_is_fine(start: Start) -> None:
    assert finish(start("down"))[:2] == (0, "nothing to take down\n")
    code, stdout, _ = finish(start("down", "--json"))
    assert (code, json.loads(stdout)) == (0, {"removed": []})


@needs_root
def test_deregister_of_an_unregistered_node_is_1(start: Start) -> None:
    code, stdout, stderr = finish(start("deregister", "--api", "https://127.0.0.1:1"))
    assert (code, stdout) == (1, "")
    assert stderr.splitlines()[-1].startswith("plexd: not registered")


@needs_root
def test_deregistered_node_can_purge_its_data(start: Start, api: str, tmp_path: Path) -> None:
    code, stdout, _ = finish(start("join", "--token-stdin", "--api", api), TOKEN)
    node_id = stdout.splitlines()[0].removeprefix("node_id: ")
    code, stdout, stderr = finish(start("deregister", "--json", "--api", api))
    assert code == 0, stderr
    assert json.loads(stdout) == {"node_id": node_id, "deregistered": True, "purged": False}
    assert (tmp_path / "data" / "identity.json.deregistered").exists()
    code, stdout, stderr = finish(start("deregister", "--purge", "--yes", "--api", api))
    assert (code, stdout) == (0, "local data purged\n"), stderr
    assert not (tmp_path / "data" / "identity.json.deregistered").exists()


def test_purge_without_a_file_needs_the_directory_named(start: Start) -> None:
    if Path("/etc/plexd/config.yaml").exists():
        pytest.skip("this host has a configuration")
    code, _, stderr = finish(start("deregister", "--purge", PLEXD_CONFIG="", PLEXD_DATA_DIR="/srv/plexd"))
    assert code == 1
    assert stderr.startswith("plexd: not purged: without a configuration file")


@needs_root
@pytest.mark.parametrize("command", ["down", "deregister"])
def test_changing_interfaces_needs_root(command: str) -> None:
    program = (  # everything is imported before: somebody else may not be able to read this interpreter's files
        "import os, sys, plexd.cli.node, plexd.log; from plexd.cli.main import main\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        arguments = [command, "--data-dir", f"{directory}/data", "--config", "/dev/null"]
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=60
        )
    assert (done.returncode, done.stdout) == (9, "")
    assert done.stderr.splitlines()[-1].startswith("plexd: ")
    assert "root" in done.stderr
