"""The routes of the API socket, asked over a real one by real users."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from plexd.api import rights
from plexd.api.assembly import local_listening_socket
from plexd.api.http_server import Limits
from plexd.api.listening_sockets import ListeningSocket
from plexd.api.node import node_routes, probe_routes
from plexd.errors import ListenerError

GROUP, OTHER_GROUP, USER = 47011, 47012, 47013  # nobody on this host has them
STATUS = b'{"node_id": "n_41c9",  "uptime": "2h16m4s"}'
PEERS = b'[{"id":"n_9c20"}]'
HEALTH = b'{"status":"healthy"}'
POLICIES = b'{"default":"deny","policies":[]}'

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users")


class Told:
    """An overview with known answers."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.fault: Exception | None = None

    async def status(self) -> bytes:
        if self.fault is not None:
            raise self.fault
        return STATUS

    async def peers(self) -> bytes:
        return PEERS

    async def peer(self, name: str) -> bytes | None:
        return None

    async def policies(self) -> bytes:
        return POLICIES

    async def health(self) -> bytes:
        return HEALTH

    def pipeline(self, name: str) -> bytes | None:
        return None if self.reason == "registration_pending" else b'{"state":"ok","of":"%s"}' % name.encode()

    async def not_ready(self) -> str | None:
        return self.reason


@pytest.fixture
def path() -> Iterator[Path]:
    """In a directory that other users may enter."""
    with tempfile.TemporaryDirectory(prefix="plexd-api") as name:
        Path(name).chmod(0o755)
        yield Path(name) / "api.sock"


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> None:
    """This host has a group plexd."""
    monkeypatch.setattr(rights, "group_id", lambda name: GROUP if name == "plexd" else None)


@pytest.fixture
def no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights, "group_id", lambda name: None)


def make_api(path: Path, told: Told) -> ListeningSocket:
    return local_listening_socket(path, (*node_routes(told), *probe_routes(told)), rights.SocketGate(), Limits())


Scene = Callable[[httpx.AsyncClient], Awaitable[None]]


def play(path: Path, scene: Scene, told: Told | None = None) -> None:
    async def main() -> None:
        api = make_api(path, told or Told())
        api.open()
        serving = asyncio.create_task(api.run())
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with asyncio.timeout(60), httpx.AsyncClient(transport=transport, base_url="http://plexd") as client:
            await scene(client)
        serving.cancel()
        await asyncio.wait([serving])

    asyncio.run(main())


async def ask_as(path: Path, route: str, uid: int, gid: int, groups: Sequence[int] = ()) -> tuple[int, str]:
    """What a process of that user gets: status and body, or 0 and the error."""
    program = (
        "import http.client, os, socket, sys\n"
        "path, route, uid, gid = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])\n"
        "os.setgroups(eval(sys.argv[5])); os.setgid(gid); os.setuid(uid)\n"
        "connection = http.client.HTTPConnection('plexd')\n"
        "connection.sock = socket.socket(socket.AF_UNIX)\n"
        "try: connection.sock.connect(path)\n"
        "except OSError as exc: print(0, type(exc).__name__); sys.exit()\n"
        "connection.request('GET', route)\n"
        "answer = connection.getresponse()\n"
        "print(answer.status, answer.read().decode())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(path), route, str(uid), str(gid), repr(list(groups)),
        stdout=subprocess.PIPE,
    )  # fmt: skip
    stdout, _ = await process.communicate()
    status, _, body = stdout.decode().strip().partition(" ")
    return int(status), body


# routes


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/status", STATUS),
        ("/v1/peers", PEERS),
        ("/v1/policies", POLICIES),
        ("/v1/health", HEALTH),
        ("/v1/metrics/status", b'{"state":"ok","of":"metrics"}'),
        ("/v1/log-status", b'{"state":"ok","of":"logs"}'),
        ("/v1/audit/status", b'{"state":"ok","of":"audit"}'),
        ("/v1/status?x=y", STATUS),
        ("/v1/st%61tus", STATUS),
        ("/healthz", b'{"status":"ok"}'),
        ("/readyz", b'{"status":"ready"}'),
    ],
)
def test_route_answers_with_the_document_as_it_is(path: Path, no_group: None, route: str, body: bytes) -> None:
    async def scene(client: httpx.AsyncClient) -> None:
        answer = await client.get(route)
        assert (answer.status_code, answer.content) == (200, body)

    play(path, scene)


def test_nothing_is_delivered_before_the_registration(path: Path, no_group: None) -> None:
    async def scene(client: httpx.AsyncClient) -> None:
        answer = await client.get("/v1/log-status")
        assert (answer.status_code, answer.json()["code"]) == (503, "not_registered")

    told = Told()
    told.reason = "registration_pending"
    play(path, scene, told)


@pytest.mark.parametrize(
    "route", ["/", "/v1", "/v1/status/", "/v1%2Fstatus", "/v1/%2573tatus", "/V1/status", "//v1/status", "/v1/secrets"]
)
def test_unknown_path_is_404(path: Path, no_group: None, route: str) -> None:
    async def scene(client: httpx.AsyncClient) -> None:
        answer = await client.get(route)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert answer.json()["error"]

    play(path, scene)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"])
def test_other_method_is_405_and_says_what_is_allowed(path: Path, no_group: None, method: str) -> None:
    async def scene(client: httpx.AsyncClient) -> None:
        answer = await client.request(method, "/v1/status")
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
        if method != "HEAD":
            assert answer.json()["code"] == "method_not_allowed"

    play(path, scene)


def test_failure_is_500_without_detail_and_the_next_request_works(path: Path, no_group: None) -> None:
    told = Told()

    async def scene(client: httpx.AsyncClient) -> None:
        told.fault = ValueError("the detail")
        with capture_logs() as records:
            answer = await client.get("/v1/status")
        assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
        assert "the detail" not in answer.text
        assert [record["event"] for record in records if record["log_level"] == "error"] == ["request failed"]
        told.fault = None
        assert (await client.get("/v1/status")).status_code == 200

    play(path, scene, told)


def test_readiness_gives_its_reason(path: Path, no_group: None) -> None:
    told = Told()
    told.reason = "mesh_down"

    async def scene(client: httpx.AsyncClient) -> None:
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": "not_ready", "reason": "mesh_down"})
        assert (await client.get("/healthz")).status_code == 200

    play(path, scene, told)


# rights


@needs_root
@pytest.mark.parametrize(
    ("uid", "gid", "groups", "status"),
    [(0, 0, [], 200), (USER, GROUP, [], 200), (USER, OTHER_GROUP, [GROUP], 200), (USER, OTHER_GROUP, [], 0)],
)
def test_root_and_the_group_may_ask(
    path: Path, group: None, uid: int, gid: int, groups: list[int], status: int
) -> None:
    async def scene(_: httpx.AsyncClient) -> None:
        assert (await ask_as(path, "/v1/status", uid, gid, groups))[0] == status

    play(path, scene)


@needs_root
def test_without_the_group_only_root_may_ask(path: Path, no_group: None) -> None:
    async def scene(_: httpx.AsyncClient) -> None:
        assert (await ask_as(path, "/v1/peers", 0, 0))[0] == 200
        assert await ask_as(path, "/v1/peers", USER, 0, [0]) == (0, "PermissionError")

    with capture_logs() as records:
        play(path, scene)
    (warning,) = [record for record in records if record["log_level"] == "warning"]
    assert "no group plexd" in warning["reason"]


@needs_root
@pytest.mark.parametrize("route", ["/v1/status", "/v1/peers", "/v1/health"])
def test_rights_do_not_rest_on_the_mode_alone(path: Path, group: None, route: str) -> None:
    """Somebody opened the file to everybody: a stranger is refused all the same, with the name of the group."""

    async def scene(_: httpx.AsyncClient) -> None:
        os.chmod(path, 0o666)  # noqa: PTH101, S103 - that is the point
        with capture_logs() as records:
            status, body = await ask_as(path, route, USER, OTHER_GROUP)
        assert (status, json.loads(body)["code"]) == (403, "access_denied")
        assert "group plexd" in json.loads(body)["error"]
        (denied,) = [record for record in records if record["event"] == "request denied"]
        assert (denied["uid"], denied["gid"], denied["path"]) == (USER, OTHER_GROUP, route)
        assert (await ask_as(path, route, USER, OTHER_GROUP, [GROUP]))[0] == 200
        assert (await ask_as(path, "/healthz", USER, OTHER_GROUP))[0] == 200

    play(path, scene)


# life


async def test_socket_is_there_before_and_gone_after(path: Path, no_group: None) -> None:
    api = make_api(path, Told())
    api.open()
    with socket.socket(socket.AF_UNIX) as early:
        early.connect(str(path))  # waits until somebody serves
        serving = asyncio.create_task(api.run())
        early.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(early, b"GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await loop.sock_recv(early, 1 << 16)).startswith(b"HTTP/1.1 200")
    serving.cancel()
    await asyncio.wait([serving])
    assert not path.exists()


def test_second_daemon_is_told_that_one_runs(path: Path, no_group: None) -> None:
    first = make_api(path, Told())
    first.open()
    try:
        with pytest.raises(ListenerError, match="already running"):
            make_api(path, Told()).open()
    finally:
        first.close()
    assert not path.exists()


async def test_service_that_failed_opens_its_socket_again(path: Path, no_group: None) -> None:
    api = make_api(path, Told())
    for _ in range(2):  # as the supervisor does
        serving = asyncio.create_task(api.run())
        await asyncio.sleep(0)  # it opens at once
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path))) as client:
            assert (await client.get("http://plexd/v1/status")).status_code == 200
        serving.cancel()
        await asyncio.wait([serving])
