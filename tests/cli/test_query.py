"""`plexd status` and `plexd peers`: what people read, what programs read, and how refusals end."""

from __future__ import annotations

import json
import os
import pty
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from plexd.cli.layout import format_bytes
from plexd.cli.query import peer_lines, pipeline_lines, policy_lines
from plexd.cli.status import status_lines

PLEXD = Path(sys.executable).with_name("plexd")
NOW = 1_800_000_000.0  # 2027-01-15T08:00:00Z
GROUP, OTHER_GROUP, USER = 47011, 47012, 47013  # nobody on this host has them

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users")

STATUS: dict[str, Any] = {
    "node_id": "n_41c9",
    "mesh_ip": "10.100.7.12",
    "hostname": "edge-7",
    "mode": "node",
    "version": "0.4.1",
    "state": "connected",
    "started_at": "2027-01-15T05:44:00Z",
    "uptime": "2h16m0s",
    "binary_checksum": "sha256:8f0c2a91" + "0" * 56,
    "control_plane": {
        "url": "https://cp.example.net",
        "event_stream": "connected",
        "reconnects": 1,
        "last_event_at": "2027-01-15T07:59:00Z",
        "last_heartbeat_at": "2027-01-15T07:59:48Z",
        "last_heartbeat_ok": True,
        "last_reconcile_at": "2027-01-15T07:59:26Z",
        "last_reconcile_error": "",
    },
    "conditions": [],
    "mesh": {"interface": "plexd0", "up": True, "listen_port": 51820, "peer_count": 4},
    "nat": {"public_endpoint": "198.51.100.9:51820", "type": "full_cone"},
    "counts": {"metadata": 3, "data": 2, "secrets": 1, "reports": 4, "reports_pending": 0, "reports_rejected": 0},
    "actions": {"enabled": True, "running": 0, "max_concurrent": 5, "results_pending": 0},
    "hooks": {"enabled": True, "total": 2, "not_ok": 0},
    "access": {"ssh_sessions": 0, "max_sessions": 10, "host_key_fingerprint": None},
}


def peer(peer_id: str, **members: Any) -> dict[str, Any]:
    return {
        "id": peer_id,
        "mesh_ip": "10.100.7.13",
        "public_key": "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=",
        "endpoint": "198.51.100.23:51820",
        "endpoint_source": "event",
        "path": "direct",
        "allowed_ips": ["10.100.7.13/32"],
        "last_handshake_at": "2027-01-15T07:59:48Z",
        "rx_bytes": 1258291,
        "tx_bytes": 812,
        "psk_set": True,
        "connected": True,
        "obstacle": None,
    } | members


LONG = {
    "code": "no_handshake",
    "text": "never a handshake with 198.51.100.77:51820 for 4m10s: 14800 bytes sent, 0 received",
    "remedy": "check that the peer runs",
}
PEERS = [
    peer("n_9c20"),
    peer("n_77aa", endpoint="198.51.100.77:51820", endpoint_source="state", path="relay", last_handshake_at=None,
         rx_bytes=0, tx_bytes=14800, connected=False, obstacle=LONG),
    peer("n_bad", mesh_ip=None, public_key=None, endpoint=None, endpoint_source=None, path=None, allowed_ips=[],
         last_handshake_at=None, rx_bytes=0, tx_bytes=0, psk_set=False, connected=False,
         obstacle={"code": "rejected", "text": "bad public key", "remedy": "correct it"}),
]  # fmt: skip


# status as text


def test_status_reads_like_this() -> None:
    assert status_lines(STATUS, NOW) == [
        "Node:            n_41c9 (edge-7)",
        "State:           connected",
        "Conditions:      -",
        "Mode:            node",
        "Version:         0.4.1 (sha256:8f0c2a91…)",
        "Uptime:          2h16m",
        "Mesh:            plexd0 up, 10.100.7.12, port 51820, 4 peers",
        "NAT:             198.51.100.9:51820 (full_cone)",
        "Control plane:   https://cp.example.net, stream connected, 1 reconnect, heartbeat ok 12s ago",
        "Reconcile:       34s ago",
        "State entries:   metadata 3, data 2, secrets 1, reports 4 (0 pending)",
        "Actions:         enabled, 0/5 running",
        "Hooks:           2, 0 not ok",
    ]


def test_status_of_an_unregistered_node_reads_like_this() -> None:
    unknown = STATUS | dict.fromkeys(
        ("node_id", "mesh_ip", "hostname", "version", "binary_checksum", "mesh", "nat", "counts")
    )
    unknown["state"] = "registering"
    unknown["control_plane"] = STATUS["control_plane"] | {
        "event_stream": "stopped", "reconnects": 0, "last_heartbeat_at": None, "last_heartbeat_ok": None,
        "last_reconcile_at": None,
    }  # fmt: skip
    unknown["actions"] = {"enabled": False, "running": 0, "max_concurrent": 0, "results_pending": 0}
    unknown["hooks"] = {"enabled": False, "total": 0, "not_ok": 0}
    assert status_lines(unknown, NOW) == [
        "Node:            not registered (-)",
        "State:           registering",
        "Conditions:      -",
        "Mode:            node",
        "Version:         -",
        "Uptime:          2h16m",
        "Mesh:            -",
        "NAT:             -",
        "Control plane:   https://cp.example.net, stream stopped, 0 reconnects",
        "Reconcile:       never",
        "Actions:         off",
        "Hooks:           off",
    ]


def test_conditions_follow_with_what_to_do() -> None:
    degraded = STATUS | {
        "state": "degraded",
        "conditions": [
            {"code": "clock_skew", "severity": "warning", "text": "this clock differs (+73 s)",
             "since": "2027-01-15T07:56:00Z", "remedy": "check time synchronisation"},
        ],
    }  # fmt: skip
    lines = status_lines(degraded, NOW)
    assert "Conditions:      clock_skew" in lines
    assert lines[-3:] == ["", "clock_skew for 4m: this clock differs (+73 s)", "  check time synchronisation"]


def test_failed_attempts_show() -> None:
    failing = STATUS | {
        "mesh": {"interface": "plexd0", "up": False, "listen_port": None, "peer_count": 0},
        "control_plane": STATUS["control_plane"]
        | {"last_heartbeat_ok": False, "last_reconcile_error": "state: connection refused"},
    }
    text = "\n".join(status_lines(failing, NOW))
    assert "heartbeat failed 12s ago" in text
    assert "34s ago, since then: state: connection refused" in text
    assert "plexd0 down, 10.100.7.12, 0 peers" in text


# peers as text


def test_table_for_programs_is_one_line_a_peer_and_whole() -> None:
    second = f"not connected: {LONG['text']} (relay, endpoint from state)"
    assert peer_lines(PEERS, NOW, None) == [
        "ID      MESH-IP      ENDPOINT             HANDSHAKE  RX      TX       PATH",
        "n_9c20  10.100.7.13  198.51.100.23:51820  12s        1.2MiB  812B     direct, endpoint from event",
        "n_77aa  10.100.7.13  198.51.100.77:51820  never      0B      14.5KiB  " + second,
        "n_bad   -            -                    never      0B      0B       not connected: bad public key",
    ]


def test_table_fits_a_terminal_of_80_columns() -> None:
    lines = peer_lines(PEERS, NOW, 80)
    assert lines == [
        "ID      MESH-IP      ENDPOINT             HANDSHAKE  RX      TX       PATH",
        "n_9c20  10.100.7.13  198.51.100.23:51820  12s        1.2MiB  812B",
        "    direct, endpoint from event",
        "n_77aa  10.100.7.13  198.51.100.77:51820  never      0B      14.5KiB",
        "    not connected: never a handshake with 198.51.100.77:51820 for 4m10s: 14800",
        "    bytes sent, 0 received (relay, endpoint from state)",
        "n_bad   -            -                    never      0B      0B",
        "    not connected: bad public key",
    ]


@pytest.mark.parametrize("width", [80, 100, 132])
def test_long_names_and_addresses_are_shortened_on_a_terminal_only(width: int) -> None:
    long = peer(
        "3f2504e0-4f89-41d3-9a0c-0305e82c3301",
        mesh_ip="fd00:100:200:300:400:500:600:700",
        endpoint="[2001:db8:1111:2222:3333:4444:5555:6666]:51820",
    )
    assert all(len(line) <= width for line in peer_lines([long], NOW, width))
    assert "…" in peer_lines([long], NOW, width)[1]
    (_, whole) = peer_lines([long], NOW, None)
    for text in (long["id"], long["mesh_ip"], long["endpoint"]):
        assert text in whole


# policies as text


def policy_rule(**members: Any) -> dict[str, Any]:
    written = {"src": "n_41c9", "dst": "*", "port": 0, "protocol": "", "action": "allow"}
    return {**written, "packets": 0, "bytes": 0, "note": None, **members}


POLICIES = {
    "default": "deny",
    "enforced": True,
    "applied_at": "2027-01-15T07:59:48Z",
    "policies": [
        {
            "id": "web",
            "rules": [
                policy_rule(dst="10.100.7.0/24", port=443, protocol="tcp", packets=812, bytes=1258291),
                policy_rule(src="n_9c20", packets=None, bytes=None, note="not a node that is known"),
            ],
        },
        {"id": "empty", "rules": []},
    ],
}


def test_rules_are_listed_in_order_with_what_they_met_and_why_they_do_nothing() -> None:
    assert policy_lines(POLICIES, NOW, None) == [
        "default: deny",
        "",
        "POLICY  RULE  SRC     DST            PORT  PROTO  ACTION  PACKETS  BYTES   NOTE",
        "web     0     n_41c9  10.100.7.0/24  443   tcp    allow   812      1.2MiB",
        "web     1     n_9c20  *              any   any    allow   -        -       not a node that is known",
        "",
        "in force for 12s",
    ]
    assert all(len(line) <= 80 for line in policy_lines(POLICIES, NOW, 80))


def test_policies_that_are_not_enforced_or_not_in_force_say_so() -> None:
    assert policy_lines(POLICIES | {"enforced": False}, NOW, None)[-1].startswith("policy.enabled is false: nothing")
    assert policy_lines(POLICIES | {"applied_at": None}, NOW, None)[-1].startswith("not in force yet")


def test_no_peers_leave_the_header() -> None:
    assert peer_lines([], NOW, 80) == ["ID  MESH-IP  ENDPOINT  HANDSHAKE  RX  TX  PATH"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0B"), (1023, "1023B"), (1024, "1.0KiB"), (1258291, "1.2MiB"), (1048570, "1.0MiB"), (1 << 30, "1.0GiB"),
        (5 << 40, "5.0TiB"), (5000 << 40, "5000.0TiB"),
    ],
)  # fmt: skip
def test_bytes_read_like_this(number: int, text: str) -> None:
    assert format_bytes(number) == text


# the commands, over a real socket


class Daemon:
    """Something that listens where the daemon would, and gives one answer, `before` it others, one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.status, self.body = 200, b"{}"
        self.before: list[tuple[int, bytes]] = []
        self.requests: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                head = connection.recv(1 << 16).decode()
                self.requests.append(head.split("\r\n")[0])
                status, body = self.before.pop(0) if self.before else (self.status, self.body)
                connection.sendall(b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n" % (status, len(body)))
                connection.sendall(body)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that other users may enter."""
    with tempfile.TemporaryDirectory(prefix="plexd-query") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def daemon(directory: Path) -> Iterator[Daemon]:
    daemon = Daemon(directory / "api.sock")
    yield daemon
    daemon.close()


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(directory: Path) -> Run:
    def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PLEXD")}
        return subprocess.run(
            [PLEXD, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**clean, "PLEXD_NODE_API_SOCKET": str(directory / "api.sock"), **environ},
        )

    return run


def test_peer_that_comes_while_its_name_is_looked_up_is_answered_for(daemon: Daemon, run: Run) -> None:
    daemon.before = [(404, b'{"code":"not_found","error":"no such peer"}')]
    daemon.body = b'{"connected":false,"obstacle":{"code":"rejected"}}'
    done = run("why", "no.such.name.invalid", "--json")
    assert (done.returncode, done.stdout, done.stderr) == (1, f"{daemon.body.decode()}\n", "")
    assert len(daemon.requests) == 2


@pytest.mark.parametrize(
    ("command", "route"), [("status", "/v1/status"), ("peers", "/v1/peers"), ("policies", "/v1/policies")]
)
def test_json_is_the_body_unchanged(run: Run, daemon: Daemon, command: str, route: str) -> None:
    daemon.body = '{"b":  1.50,\n "a": "ü…", "z": 123456789012345678901234567890}'.encode()
    done = run(command, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.encode() == daemon.body + b"\n"
    assert daemon.requests == [f"GET {route} HTTP/1.1"]


def test_text_comes_from_the_same_answer(run: Run, daemon: Daemon) -> None:
    daemon.body = json.dumps(STATUS).encode()
    done = run("status")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Node:            n_41c9 (edge-7)\nState:           connected\n")
    daemon.body = json.dumps(PEERS).encode()
    assert len(run("peers").stdout.splitlines()) == 1 + len(PEERS)
    assert run("peers", "--json").stdout == daemon.body.decode() + "\n"
    daemon.body = json.dumps(POLICIES).encode()
    assert run("policies").stdout.splitlines()[-1].startswith("in force for")


@pytest.mark.parametrize("answers", [True, False])
def test_asking_loads_nothing_that_takes_longer_than_the_answer(daemon: Daemon, tmp_path: Path, answers: bool) -> None:
    daemon.body = json.dumps(STATUS).encode()
    config = tmp_path / "config.yaml"
    config.write_text(f"node_api: {{socket: {daemon.path if answers else tmp_path / 'none'}}}")
    program = (
        "import sys; from plexd.cli.main import main\n"
        "code = main(['status', '--config', sys.argv[1]])\n"
        "big = {'pydantic', 'structlog', 'httpx', 'asyncio', 'nacl', 'pyroute2'}\n"
        "print(code, sorted(big & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(config)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{0 if answers else 3} []"


def test_no_text_from_elsewhere_reaches_the_terminal_as_an_order(run: Run, daemon: Daemon) -> None:
    order = "web\x1b]0;owned\x07\x1b[2J\nallow\x9b2J"
    spelled = r"web\u001b]0;owned\u0007\u001b[2J\nallow\u009b2J"
    daemon.body = json.dumps([peer(order)]).encode()
    assert run("peers").stdout.splitlines()[1].startswith(spelled)
    assert json.loads(run("peers", "--json").stdout)[0]["id"] == order
    daemon.status, daemon.body = 404, json.dumps({"error": order}).encode()
    assert run("peers").stderr == f"plexd: {spelled}\n"


def test_nobody_to_list_says_so_beside_the_header(run: Run, daemon: Daemon) -> None:
    daemon.body = b"[]"
    done = run("peers")
    assert (done.returncode, done.stdout, done.stderr) == (
        0, "ID  MESH-IP  ENDPOINT  HANDSHAKE  RX  TX  PATH\n", "(none)\n",
    )  # fmt: skip
    assert run("peers", "--json").stdout == "[]\n"


def test_terminal_of_80_columns_shows_no_longer_line(daemon: Daemon) -> None:
    daemon.body = json.dumps(PEERS).encode()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [PLEXD, "peers", "--socket", str(daemon.path)],
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "80"},
    )
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and select.select([ours], [], [], 60)[0]:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # how a terminal says that everybody has left
            break
    os.close(ours)
    assert process.wait(60) == 0
    lines = shown.decode().splitlines()
    assert lines[0].startswith("ID ")
    assert max(map(len, lines)) <= 80


def test_watching_asks_again_until_interrupted(daemon: Daemon) -> None:
    daemon.body = json.dumps(STATUS).encode()
    process = subprocess.Popen(
        [PLEXD, "status", "--watch", "--socket", str(daemon.path)], stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(daemon.requests) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(2)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout.count("Node: ") >= 1


def test_watching_in_a_terminal_draws_one_screen_and_leaves_none_behind(daemon: Daemon) -> None:
    daemon.body = json.dumps(STATUS).encode()
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [PLEXD, "status", "--watch", "--socket", str(daemon.path)], stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        heard = b""
        deadline = time.monotonic() + 60
        while heard.count(b"\033[H") < 2:
            assert time.monotonic() < deadline
            if select.select([ours], [], [], 1)[0]:
                heard += os.read(ours, 65536)
        daemon.body = b""  # no answer that makes sense
        while b"plexd: " not in heard:
            assert time.monotonic() < deadline
            if select.select([ours], [], [], 1)[0]:
                heard += os.read(ours, 65536)
        process.send_signal(2)
        assert process.wait(60) == 130
        while select.select([ours], [], [], 0)[0]:
            try:
                heard += os.read(ours, 65536)
            except OSError:
                break
    os.close(ours)
    assert heard.startswith(b"\033[?1049h")
    assert heard.rstrip().endswith(b"\033[?1049l")
    assert b"State:           \033[32mconnected\033[0m" in heard


@pytest.mark.parametrize(("environ", "is_coloured"), [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False)])
def test_terminal_gets_colours_unless_it_wants_none(daemon: Daemon, environ: dict[str, str], is_coloured: bool) -> None:
    daemon.body = json.dumps(STATUS).encode()
    ours, theirs = pty.openpty()
    command = [str(PLEXD), "status", "--socket", str(daemon.path)]
    plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=plain | environ) as process:
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                shown += os.read(ours, 1 << 16)
            except OSError:  # everybody has left
                break
        assert process.wait(60) == 0
    os.close(ours)
    assert b"connected" in shown
    assert (b"\033[" in shown) == is_coloured


def test_status_fits_into_a_narrow_terminal() -> None:
    assert max(map(len, status_lines(STATUS, NOW, 80))) <= 80
    assert len(status_lines(STATUS, NOW, 80)) > len(status_lines(STATUS, NOW))
    text = "\n".join(status_lines(STATUS, NOW, 80, colours=True))
    assert "\033[32mconnected\033[0m" in text


# where the socket is


def test_socket_is_named_by_flag_over_variable_over_file(run: Run, daemon: Daemon, tmp_path: Path) -> None:
    daemon.body = json.dumps(STATUS).encode()
    here, gone = str(daemon.path), str(tmp_path / "gone")
    config = tmp_path / "config.yaml"

    def code(in_file: str, *flags: str, **environ: str) -> int:
        config.write_text(f"node_api: {{socket: {in_file}}}\n")
        return run("status", "--config", str(config), *flags, **environ).returncode

    assert code(here, PLEXD_NODE_API_SOCKET="") == 0
    assert code(gone, PLEXD_NODE_API_SOCKET="") == 3
    assert code(gone, PLEXD_NODE_API_SOCKET=here) == 0
    assert code(gone, PLEXD_NODE_API_SOCKET="", PLEXD__NODE_API__SOCKET=here) == 0
    assert code(here, "--socket", gone, PLEXD_NODE_API_SOCKET=here) == 3
    assert code(gone, "--socket", here, PLEXD_NODE_API_SOCKET=gone) == 0


@pytest.mark.parametrize("content", [None, "socket: [unclosed", "no_such_key: 1\n"])
def test_file_that_is_missing_or_wrong_is_no_obstacle(
    run: Run, daemon: Daemon, tmp_path: Path, content: str | None
) -> None:
    daemon.body = json.dumps(STATUS).encode()
    config = tmp_path / "config.yaml"
    if content is not None:
        config.write_text(content)
    assert run("status", "--config", str(config)).returncode == 0


@pytest.mark.parametrize("place", ["api.sock", "/" + "x" * 107])
def test_place_that_cannot_be_a_socket_is_5(run: Run, place: str) -> None:
    done = run("status", "--socket", place)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("--socket: node_api.socket: must ")


# refusals


@pytest.mark.parametrize("left_behind", [False, True])
def test_daemon_that_is_not_there_is_3(run: Run, directory: Path, left_behind: bool) -> None:
    if left_behind:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(directory / "api.sock"))
    for arguments in (["status"], ["peers"], ["status", "--json"]):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr == f"plexd: daemon not reachable at {directory}/api.sock\n"


@pytest.mark.parametrize(("status", "code"), [(403, 1), (404, 4), (500, 1), (503, 1)])
def test_refusal_is_its_sentence_and_with_json_its_body(run: Run, daemon: Daemon, status: int, code: int) -> None:
    daemon.status, daemon.body = status, b'{"error": "the sentence", "code": "x"}'
    done = run("status")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "plexd: the sentence\n")
    done = run("status", "--json")
    assert (done.returncode, done.stdout) == (code, daemon.body.decode() + "\n")


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"x":1}'])
def test_refusal_without_a_sentence_says_its_status(run: Run, daemon: Daemon, body: bytes) -> None:
    daemon.status, daemon.body = 502, body
    done = run("peers")
    assert (done.returncode, done.stderr) == (1, "plexd: the daemon answered with status 502\n")


def test_something_that_is_no_daemon_is_1(run: Run, directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(directory / "api.sock"))
        listening.listen()

        def hang_up() -> None:
            connection, _ = listening.accept()
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        done = run("status")
        thread.join()
    assert (done.returncode, done.stdout) == (1, "")
    assert "gave no usable answer" in done.stderr


def test_daemon_that_says_nothing_is_given_up(directory: Path) -> None:
    program = (
        "import plexd.cli.asking as asking, sys; from plexd.cli.main import main\n"
        "asking.exchange.__kwdefaults__['seconds'] = 0.3; sys.exit(main(sys.argv[1:]))\n"
    )
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(directory / "api.sock"))
        listening.listen()
        done = subprocess.run(
            [sys.executable, "-c", program, "status", "--socket", str(directory / "api.sock")],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "did not answer in time" in done.stderr


# real users, a real group plexd


AS_USER = (  # everything is imported before: somebody else may not be able to read this interpreter's files
    "import os, sys, json.decoder, plexd.cli.query, plexd.cli.status, plexd.log; from plexd.cli.main import main\n"
    "uid, gid, groups = int(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3])\n"
    "os.setgroups(groups); os.setgid(gid); os.setuid(uid)\n"
    "sys.exit(main(sys.argv[4:]))\n"
)


def plexd_as(uid: int, gid: int, groups: Sequence[int], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", AS_USER, str(uid), str(gid), repr(list(groups)), *arguments],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.fixture
def unregistered(directory: Path) -> Iterator[Path]:
    """The socket of a real daemon that waits for its control plane, on a host that has a group plexd.

    The group is in a file that is bound over /etc/group in a mount namespace of the daemon's own.
    """
    groups = directory / "group"
    groups.write_text(f"root:x:0:\nplexd:x:{GROUP}:\n")
    config = directory / "config.yaml"
    path = directory / "run" / "api.sock"
    config.write_text(
        f"data_dir: {directory}/data\npolicy: {{enabled: false}}\nmesh: {{interface: plexd-query}}\n"
        f"node_api: {{socket: {path}}}\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as nowhere:  # connections are accepted and never answered
        process = subprocess.Popen(
            [
                "unshare", "--mount", "sh", "-c", f'mount --bind {groups} /etc/group && exec "$@"', "sh",
                PLEXD, "up", "--config", config, "--api", f"http://127.0.0.1:{nowhere.getsockname()[1]}",
            ],
            stderr=subprocess.PIPE, env={**os.environ, "PLEXD_BOOTSTRAP_TOKEN": "token-for-the-tests"}, text=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while not path.exists():
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield path
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode == 0
    assert not path.exists()


@needs_root
def test_group_decides_who_is_answered(unregistered: Path) -> None:
    """Root and members are told that the node registers; a stranger is told what would help."""
    status = unregistered.lstat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o660, 0, GROUP)
    assert unregistered.parent.stat().st_mode & 0o7777 == 0o755
    for uid, gid, groups in ((0, 0, []), (USER, GROUP, []), (USER, OTHER_GROUP, [GROUP])):
        done = plexd_as(uid, gid, groups, "status", "--json", "--socket", str(unregistered))
        assert (done.returncode, done.stderr) == (0, ""), (uid, gid, groups)
        told = json.loads(done.stdout)
        assert (told["state"], told["node_id"]) == ("registering", None)
    for command in ("status", "peers"):
        done = plexd_as(USER, OTHER_GROUP, [], command, "--socket", str(unregistered))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"plexd: no permission to ask the daemon at {unregistered}: be root, or a member of the group plexd\n"
        )


@needs_root
def test_member_who_cannot_read_the_file_finds_the_daemon_all_the_same(unregistered: Path) -> None:
    config = unregistered.parents[1] / "config.yaml"
    config.chmod(0o600)
    done = plexd_as(USER, GROUP, [], "status", "--config", str(config), "--socket", str(unregistered))
    assert done.returncode == 0, done.stderr
    assert "State:           registering" in done.stdout


@needs_root
def test_second_daemon_on_the_socket_is_1(unregistered: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [PLEXD, "up", "--api", "http://127.0.0.1:1", "--data-dir", tmp_path / "data", "--socket", unregistered],
        capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PLEXD__POLICY__ENABLED": "false", "PLEXD_BOOTSTRAP_TOKEN": "x"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "plexd is already running" in done.stderr.splitlines()[-1]
    assert plexd_as(0, 0, [], "status", "--socket", str(unregistered)).returncode == 0


# pipelines


PIPELINE: dict[str, Any] = {
    "enabled": True,
    "state": "failing",
    "buffered": 12,
    "capacity": 10000,
    "dropped": 5,
    "last_delivery_at": "2027-01-15T07:58:20Z",
    "last_error": "logs: the control plane answered 503 Service Unavailable",
    "sources": [
        {"name": "journald", "state": "reading", "detail": "", "position": "s=5c0", "entries": 8812,
         "last_entry_at": "2027-01-15T07:59:59Z"},
        {"name": "files", "state": "paused", "detail": "3 files", "position": "", "entries": 0, "last_entry_at": None},
    ],
    "counters": {"sent": 8680, "dropped": {"overflow": 4, "rejected": 1}},
}  # fmt: skip


def test_pipeline_is_told_with_its_sources() -> None:
    assert pipeline_lines(PIPELINE, NOW, None) == [
        "State:         failing",
        "Buffered:      12/10000",
        "Sent:          8680",
        "Dropped:       overflow 4, rejected 1",
        "Last delivery: 1m40s ago",
        "Last error:    logs: the control plane answered 503 Service Unavailable",
        "",
        "SOURCE    STATE    ENTRIES  LAST   DETAIL",
        "journald  reading  8812     1s     -",
        "files     paused   0        never  3 files",
    ]


def test_pipeline_that_never_delivered_says_so() -> None:
    quiet = PIPELINE | {"last_delivery_at": None, "last_error": "", "sources": []}
    quiet["counters"] = {"sent": 0, "dropped": {}}
    lines = pipeline_lines(quiet, NOW, None)
    assert lines[3:6] == ["Dropped:       0", "Last delivery: never", "Last error:    -"]
    assert lines[-1] == "SOURCE  STATE  ENTRIES  LAST  DETAIL"
