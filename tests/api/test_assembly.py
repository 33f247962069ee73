"""Who may do what at the API server: real users at the socket, tokens over TCP, anybody at the probes."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from plexd.api import rights
from plexd.api.assembly import ApiServer
from plexd.config.models import Config
from plexd.errors import ListenerError
from plexd.mesh.desired import Desired
from plexd.store.files import DataDirectory
from tests.api_harness import READERS, SECRET_READERS, TOKEN, House, Told

USER, OTHER_GROUP = 47013, 47014
needs_users = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("setpriv", "curl"))),
    reason="becomes other users with setpriv, and asks with curl",
)

REPORT = json.dumps({"content_type": "application/json", "payload": 1})
READ = (
    "/v1/status", "/v1/peers", "/v1/health", "/v1/state", "/v1/state/metadata", "/v1/state/metadata/region",
    "/v1/state/data", "/v1/state/data/proxy", "/v1/state/report", "/v1/openapi.json",
)  # fmt: skip
SECRET = ("/v1/state/secrets", "/v1/state/secrets/db-pass")
ADMIN = {"/v1/reconcile": 202, "/v1/config/reload": 200}


class Caller(NamedTuple):
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


ROOT = Caller(0, 0)
CALLERS = {
    "root": ROOT,
    "primary group": Caller(USER, READERS),
    "supplementary group": Caller(USER, OTHER_GROUP, (READERS,)),
    "both groups": Caller(USER, OTHER_GROUP, (READERS, SECRET_READERS)),
    "secret readers only": Caller(USER, SECRET_READERS),
    "stranger": Caller(USER, OTHER_GROUP),
}
MAY_READ = {"root", "primary group", "supplementary group", "both groups"}
MAY_READ_SECRETS = {"root", "both groups", "secret readers only"}


def curl(house: House, caller: Caller, method: str, route: str, body: str | None = None) -> tuple[int, Any]:
    """Status and document; 0 where the socket could not be opened."""
    groups = [f"--groups={','.join(map(str, caller.groups))}"] if caller.groups else ["--clear-groups"]
    command = [
        "setpriv", f"--reuid={caller.uid}", f"--regid={caller.gid}", *groups,
        "curl", "-sS", "--max-time", "20", "--unix-socket", str(house.socket), "-X", method,
    ]  # fmt: skip
    if body is not None:
        command += ["--data-binary", body]
    done = subprocess.run(
        [*command, "-w", "\n%{http_code}", f"http://plexd{route}"], capture_output=True, text=True, check=False
    )
    text, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(text) if text else None


@contextlib.contextmanager
def open_to_strangers() -> Iterator[Path]:
    """A directory whose socket other users get to; pytest's own it closes to them whenever a run begins."""
    with tempfile.TemporaryDirectory(prefix="plexd-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with open_to_strangers() as directory, House(directory) as house:
        yield house


@needs_users
@pytest.mark.parametrize("who", CALLERS)
@pytest.mark.parametrize("opened", [False, True], ids=["0660", "opened by hand"])
def test_access_table(house: House, who: str, opened: bool) -> None:
    """With the mode it has, and with one somebody gave it by hand: rights rest on the caller, not on the mode."""
    caller, can_connect = CALLERS[who], opened or who in MAY_READ
    house.socket.chmod(0o666 if opened else 0o660)
    denied = 403 if can_connect else 0
    for route in READ:
        status, document = curl(house, caller, "GET", route)
        assert status == (200 if who in MAY_READ else denied), route
        assert not document or status == 200 or document["code"] == "access_denied"
    for method, expected in (("PUT", 200), ("DELETE", 204)):
        status, _ = curl(house, caller, method, "/v1/state/report/a", REPORT)
        assert status == (expected if who in MAY_READ else denied), method
    for route in SECRET:
        status, document = curl(house, caller, "GET", route)
        assert status == (200 if who in MAY_READ_SECRETS and can_connect else denied), route
        assert status in {0, 200} or document["code"] == "secret_access_denied"
    for route, expected in ADMIN.items():
        assert curl(house, caller, "POST", route)[0] == (expected if who == "root" else denied), route
    for route in ("/healthz", "/readyz"):
        assert curl(house, caller, "GET", route)[0] == (200 if can_connect else 0), route
    if who in MAY_READ:
        names = curl(house, caller, "GET", "/v1/state")[1]["secret_keys"]
        assert bool(names) == (who in MAY_READ_SECRETS)


@needs_users
def test_user_of_the_daemon_is_as_good_as_root(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.socket.chmod(0o666)
    monkeypatch.setattr("plexd.api.rights.os.geteuid", lambda: USER)
    stranger = CALLERS["stranger"]
    assert curl(house, stranger, "GET", "/v1/state/secrets/db-pass")[1]["value"] == "s3cr3t!"
    assert curl(house, stranger, "POST", "/v1/reconcile")[0] == 202


@needs_users
def test_without_the_groups_only_root_passes() -> None:
    with open_to_strangers() as directory, House(directory, {}) as house:
        assert house.socket.stat().st_mode & 0o777 == 0o600
        house.socket.chmod(0o666)
        for caller in (CALLERS["both groups"], Caller(USER, 0)):
            assert curl(house, caller, "GET", "/v1/status")[0] == 403
            assert curl(house, caller, "GET", "/v1/state/secrets")[0] == 403
        assert curl(house, ROOT, "GET", "/v1/state/secrets")[0] == 200


@needs_users
def test_groups_are_looked_up_again_when_the_configuration_is_reloaded() -> None:
    groups: dict[str, int | None] = {"plexd": READERS}
    with open_to_strangers() as directory, House(directory, groups) as house:
        both = CALLERS["both groups"]
        assert curl(house, both, "GET", "/v1/state/secrets")[0] == 403
        groups["plexd-secrets"] = SECRET_READERS
        assert curl(house, both, "GET", "/v1/state/secrets")[0] == 403
        house.call(house.look_up_groups)
        assert curl(house, both, "GET", "/v1/state/secrets")[0] == 200


def test_user_database_that_hangs_holds_up_nothing_but_the_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop_went_on = threading.Event()

    async def main(api_server: ApiServer) -> None:
        monkeypatch.setattr(rights, "group_id", lambda _: READERS if loop_went_on.wait(10) else None)
        asyncio.get_running_loop().call_soon(loop_went_on.set)
        await api_server.read_again()
        assert api_server.gate.readers == READERS

    directory, told = DataDirectory(tmp_path / "data"), Told()
    asyncio.run(main(ApiServer(Config(), directory, told, told.reload)))
    directory.close()


@needs_users
def test_before_the_registration_state_is_served_and_secrets_are_not(tmp_path: Path) -> None:
    with House(tmp_path, is_registered=False) as house:
        assert curl(house, ROOT, "GET", "/v1/state/metadata") == (200, {})
        assert curl(house, ROOT, "PUT", "/v1/state/report/a", REPORT)[0] == 200
        status, document = curl(house, ROOT, "GET", "/v1/state/secrets/db-pass")
        assert (status, document["code"]) == (503, "control_plane_unavailable")
        status, document = curl(house, ROOT, "POST", "/v1/reconcile")
        assert (status, document["code"]) == (503, "registration_pending")


@needs_users
def test_until_the_node_is_up_programs_read_what_it_knew_when_it_ended(tmp_path: Path) -> None:
    with House(tmp_path, is_registered=False, cached=Desired(metadata={"region": "us-1"})) as house:
        assert curl(house, ROOT, "GET", "/v1/state/metadata") == (200, {"region": "us-1"})
        assert curl(house, ROOT, "GET", "/v1/state")[1]["metadata"] == {"region": "us-1"}


# over TCP


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def with_token(directory: Path, token: str = TOKEN, **http: Any) -> dict[str, Any]:
    path = directory / "token"
    path.touch(0o600)
    path.write_text(f"{token}\n")
    return {"http": {"enabled": True, "listen": f"127.0.0.1:{free_port()}", "token_file": str(path), **http}}


def request(
    port: int, route: str, headers: Sequence[tuple[str, str]], method: str = "GET", body: str | None = None
) -> tuple[int, Mapping[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.putrequest(method, route, skip_host=any(name == "Host" for name, _ in headers))
        for name, value in headers:
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body.encode() if body is not None else None)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode()
    finally:
        connection.close()


BEARER = ("Authorization", f"Bearer {TOKEN}")


@pytest.fixture(scope="module")
def tcp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    directory = tmp_path_factory.mktemp("tcp")
    with House(directory, node_api=with_token(directory, allowed_hosts=("node.example",))) as house:
        yield house.ports["api over tcp"]


def test_token_opens_state_and_status_and_nothing_else(tcp: int) -> None:
    for route in ("/v1/status", "/v1/state", "/v1/state/metadata/region", "/v1/state/data", "/v1/state/report"):
        assert request(tcp, route, [BEARER])[0] == 200, route
    assert request(tcp, "/v1/state/report/tcp", [BEARER], "PUT", REPORT)[0] == 200
    assert request(tcp, "/v1/state/report/tcp", [BEARER], "DELETE")[0] == 204
    for route in ("/v1/peers", "/v1/health", "/healthz", "/readyz", "/v1/openapi.json"):
        assert request(tcp, route, [BEARER])[0] == 404, route
    for route in ADMIN:
        assert request(tcp, route, [BEARER], "POST")[0] == 404, route
    for route in SECRET:
        status, _, text = request(tcp, route, [BEARER])
        assert (status, json.loads(text)["code"]) == (403, "secret_access_denied")
    assert json.loads(request(tcp, "/v1/state", [BEARER])[2])["secret_keys"] == []


def test_secrets_over_tcp_when_they_are_allowed(tmp_path: Path) -> None:
    with House(tmp_path, node_api=with_token(tmp_path, secrets=True)) as house:
        port = house.ports["api over tcp"]
        assert json.loads(request(port, "/v1/state/secrets/db-pass", [BEARER])[2])["value"] == "s3cr3t!"
        assert request(port, "/v1/state/secrets/db-pass", [])[0] == 401


@pytest.mark.parametrize(
    "headers",
    [
        [], [("Authorization", "")], [("Authorization", TOKEN)], [("Authorization", f"Basic {TOKEN}")],
        [("Authorization", f"Bearer  {TOKEN}")], [("Authorization", f"Bearer {TOKEN[:-1]}")],
        [("Authorization", f"Bearer {TOKEN}x")], [("Authorization", f"Bearer {TOKEN} x")],
        [("Authorization", "Bearer ")],
        [("Authorization", "Bearer \xe9" + TOKEN)], [BEARER, BEARER],
    ],
)  # fmt: skip
def test_missing_or_wrong_token_is_401(tcp: int, headers: list[tuple[str, str]]) -> None:
    status, answered, text = request(tcp, "/v1/state", headers)
    assert (status, answered["www-authenticate"], json.loads(text)["code"]) == (401, "Bearer", "unauthorized")
    assert TOKEN not in text


@pytest.mark.parametrize(("token", "answer"), [("", b"HTTP/1.1 401"), (TOKEN, b"HTTP/1.1 100")])
def test_body_is_asked_for_once_the_token_was_shown(tcp: int, token: str, answer: bytes) -> None:
    head = (
        "PUT /v1/state/report/large HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
        f"Authorization: Bearer {token}\r\nExpect: 100-continue\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", tcp), timeout=20) as sock:
        sock.sendall(head.encode())
        assert sock.recv(len(answer)) == answer


@pytest.mark.parametrize("scheme", ["bearer", "BEARER"])
def test_letter_case_of_the_scheme_does_not_matter(tcp: int, scheme: str) -> None:
    assert request(tcp, "/v1/state", [("Authorization", f"{scheme} {TOKEN}")])[0] == 200


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("Host", "127.0.0.1", 200), ("Host", "localhost:9100", 200), ("Host", "LOCALHOST", 200),
        ("Host", "[::1]:1", 200), ("Host", "node.example:9100", 200), ("Host", "evil.example", 403),
        ("Host", "127.0.0.1.evil.example", 403), ("Host", "", 403), ("Host", "127.0.0.1:x", 403),
        ("Host", "a@127.0.0.1", 403),
        ("Origin", "http://localhost", 403), ("Origin", "null", 403),
    ],
)  # fmt: skip
def test_web_pages_that_rebind_a_name_get_nothing(tcp: int, name: str, value: str, status: int) -> None:
    answered, _, text = request(tcp, "/v1/state", [(name, value), BEARER])
    assert answered == status
    assert status == 200 or json.loads(text)["code"] == "host_not_allowed"


@pytest.mark.parametrize("problem", ["short", "open", "missing", "directory", "spaces"])
def test_start_fails_without_a_good_token(tmp_path: Path, problem: str) -> None:
    settings = with_token(tmp_path, {"short": "x" * 31, "spaces": "a b " * 10}.get(problem, TOKEN))
    path = tmp_path / "token"
    if problem == "open":
        path.chmod(0o640)
    elif problem in {"missing", "directory"}:
        path.unlink()
        if problem == "directory":
            path.mkdir()
    with pytest.raises(ListenerError, match=r"token"), House(tmp_path, node_api=settings):
        pass


def test_busy_port_fails_the_start_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(ListenerError, match=r"health\.listen"),
            House(tmp_path, health={"enabled": True, "listen": f"127.0.0.1:{port}"}),
        ):
            pass
    assert not (tmp_path / "api.sock").exists()


# probes


def test_probes_answer_anybody_and_say_nothing_else(tmp_path: Path) -> None:
    health = {"enabled": True, "listen": f"127.0.0.1:{free_port()}"}
    with House(tmp_path, health=health, node_api={"enabled": False}) as house:
        port = house.ports["health listener"]
        assert not house.socket.exists()
        status, headers, text = request(port, "/healthz", [("Host", "evil.example")])
        assert (status, text, headers["connection"]) == (200, '{"status":"ok"}', "close")
        assert request(port, "/healthz", [], "HEAD")[2] == ""
        assert request(port, "/readyz", [])[2] == '{"status":"ready"}'
        house.told.reason = "mesh_down"
        status, _, text = request(port, "/readyz", [])
        assert (status, json.loads(text)) == (503, {"status": "not_ready", "reason": "mesh_down"})
        assert request(port, "/healthz", [])[0] == 200
        assert request(port, "/healthz", [], "POST")[0] == 405
        for route in ("/v1/status", "/v1/state", "/", "/v1/state/secrets"):
            assert request(port, route, [])[0] == 404
        assert request(port, "/healthz", [("X", "y" * (9 << 10))])[0] == 431


def test_65th_connection_to_the_probes_is_closed(tmp_path: Path) -> None:
    with House(tmp_path, health={"enabled": True, "listen": f"127.0.0.1:{free_port()}"}) as house:
        address = ("127.0.0.1", house.ports["health listener"])
        silent = [socket.create_connection(address, timeout=20) for _ in range(64)]
        with socket.create_connection(address, timeout=20) as late, contextlib.suppress(ConnectionResetError):
            assert late.recv(1) == b""
        for each in silent:
            each.close()
