"""The admin socket and the command, as an operator meets them."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from plexd.errors import ConfigError
from plexd.lab.controlplane import LabControlPlane
from plexd.mesh.keys import PrivateKey

HEADERS = {"user-agent": "plexd/0.1.0", "accept": "application/json", "accept-encoding": "gzip"}


def over_socket(path: Path) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path)), base_url="http://admin")


async def register(url: str, token: str, hostname: str, verify: ssl.SSLContext | bool = False) -> dict[str, Any]:
    body = {"token": token, "public_key": str(PrivateKey.generate().public()), "hostname": hostname}
    text = httpx.Request("POST", url, json=body).content
    async with httpx.AsyncClient(verify=verify, trust_env=False) as client:
        headers = HEADERS | {"authorization": f"Bearer {token}", "content-type": "application/json"}
        answer = await client.post(f"{url}/v1/register", content=text, headers=headers)
    assert answer.status_code == 201, answer.text
    identity: dict[str, Any] = answer.json()
    return identity


def run(tmp_path: Path, test: Callable[[LabControlPlane, httpx.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        path = tmp_path / "admin.sock"
        async with LabControlPlane(admin_socket=path) as plane, over_socket(path) as admin:
            assert oct(path.stat().st_mode)[-3:] == "600"
            await test(plane, admin)
        assert not path.exists()

    asyncio.run(main())


def test_nodes_are_shown_changed_and_removed_by_host_name(tmp_path: Path) -> None:
    async def test(plane: LabControlPlane, admin: httpx.AsyncClient) -> None:
        token = (await admin.post("/tokens", json={})).json()["token"]
        identity = await register(plane.url, token, "alpha")
        (shown,) = (await admin.get("/nodes")).json()
        assert (shown["id"], shown["hostname"], shown["streams"]) == (identity["node_id"], "alpha", 0)
        assert identity["node_secret_key"] not in (await admin.get("/nodes/alpha")).text
        orders: list[tuple[str, str, Any]] = [
            ("PATCH", "/nodes/alpha/state", {"members": {"metadata": {"a": "b"}}, "notify": True}),
            ("PUT", "/nodes/alpha/data/a/b", {"payload": [1, None]}),
            ("PUT", "/nodes/alpha/secrets/db", {"value": "hush"}),
            ("POST", "/nodes/alpha/flags", {"reconcile": True}),
            ("POST", "/nodes/alpha/stream", {"raw": "noise\n\n"}),
            ("POST", "/nodes/alpha/stream", {"raw_base64": "/w==", "end": True}),
            ("PUT", "/stream", {"keepalive_seconds": 1.5, "retry_milliseconds": 100}),
            ("PUT", "/policies", {"policies": []}),
            ("POST", "/signing-keys/rotate", {"transition_seconds": 60}),
            ("POST", "/nodes/alpha/revoke", None),
            ("POST", f"/nodes/{identity['node_id']}/restore", None),
        ]
        for method, path, body in orders:
            answer = await admin.request(method, path, json=body)
            assert (answer.status_code, answer.text) == (204, ""), path
        answer = await admin.put("/artifacts/1.0.0/arm64", content=b"\x7fELF")
        assert answer.status_code == 204
        event = await admin.post("/nodes/alpha/events", json={"event_type": "rotate_keys", "signer": "stranger"})
        assert event.json()["event_id"].startswith("ev-")
        state = (await admin.get("/nodes/alpha/state")).json()
        assert (state["metadata"], state["secret_refs"], state["policies"]) == (
            {"a": "b"}, [{"key": "db", "version": 1}], []
        )  # fmt: skip
        assert [(entry["key"], entry["payload"]) for entry in state["data"]] == [("a/b", [1, None])]
        chunks = plane.admin.fleet.stream(identity["node_id"]).since(0)
        assert [chunk.data for chunk in chunks if chunk.event_id is None] == [b"noise\n\n", b"\xff", b"", b""]
        assert (await admin.delete("/nodes/alpha")).status_code == 204
        assert (await admin.get("/nodes")).json() == []

    run(tmp_path, test)


def test_arrivals_can_be_read_and_waited_for(tmp_path: Path) -> None:
    async def test(plane: LabControlPlane, admin: httpx.AsyncClient) -> None:
        order = {"endpoint": "register", "count": 2, "contains": {"metadata": None}, "timeout_seconds": 0.01}
        assert (await admin.post("/arrivals/wait", json=order)).status_code == 408
        order = {"endpoint": "register", "contains": {"hostname": "beta"}}
        waiting = asyncio.create_task(admin.post("/arrivals/wait", json=order))
        for name in ("alpha", "beta"):
            await register(plane.url, plane.admin.issue_token(), name)
        (found,) = (await waiting).json()
        assert (found["body"]["hostname"], found["body"]["token"], found["status"]) == ("beta", "********", 201)
        everything = (await admin.get("/arrivals", params={"endpoint": "register", "node": "alpha"})).json()
        assert [arrival["body"]["hostname"] for arrival in everything] == ["alpha"]
        assert (await admin.get("/arrivals", params={"after": str(found["number"])})).json() == []

    run(tmp_path, test)


def test_faults_and_absence_are_ordered_over_the_socket(tmp_path: Path) -> None:
    async def test(plane: LabControlPlane, admin: httpx.AsyncClient) -> None:
        fault = {"endpoint": "register", "effect": "status", "status": 503, "count": 3}
        assert (await admin.post("/faults", json=fault)).status_code == 204
        (pending,) = (await admin.get("/faults")).json()
        assert pending.items() >= fault.items()
        assert (await admin.delete("/faults")).status_code == 204
        assert (await admin.get("/faults")).json() == []
        assert (await admin.post("/listener/stop")).status_code == 204
        with pytest.raises(httpx.ConnectError):
            await register(plane.url, plane.admin.issue_token(), "alpha")
        assert (await admin.post("/listener/start")).status_code == 204
        await register(plane.url, plane.admin.issue_token(), "alpha")

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason"),
    [
        ("GET", "/nodes/nobody", None, 404, "no node 'nobody' is registered"),
        ("POST", "/faults", {"effect": "explode"}, 400, "effect: Input should be"),
        ("POST", "/faults", {"efect": "cut"}, 400, "efect: Extra inputs"),
        ("POST", "/faults", {"effect": "cut", "node_id": "nobody"}, 404, "nobody"),
        ("PATCH", "/nodes/alpha/state", {"members": {"wishes": 1}}, 400, "wishes"),
        ("POST", "/nodes/alpha/events", {}, 400, "event_type: Field required"),
        ("GET", "/arrivals?after=x", None, 400, "after must be"),
    ],
)
def test_order_that_makes_no_sense_is_refused(
    tmp_path: Path, method: str, path: str, body: Any, status: int, reason: str
) -> None:
    async def test(plane: LabControlPlane, admin: httpx.AsyncClient) -> None:
        await register(plane.url, plane.admin.issue_token(), "alpha")
        answer = await admin.request(method, path, json=body)
        assert answer.status_code == status
        assert reason in answer.json()["error"]

    run(tmp_path, test)


async def test_socket_left_by_a_dead_process_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    async with LabControlPlane(admin_socket=path):
        with pytest.raises(ConfigError, match=r"cannot listen on .*admin\.sock: Address already in use"):
            async with LabControlPlane(admin_socket=path):
                pass
        async with over_socket(path) as admin:
            assert (await admin.get("/nodes")).json() == []


# --- the command -----------------------------------------------------------------------------------------------------


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """The running command and what it printed until it served."""
    command = [sys.executable, "-m", "plexd", "lab", "controlplane", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            printed = {}
            assert process.stdout is not None
            for line in process.stdout:
                if line == "serving until interrupted\n":
                    break
                name, _, value = line.partition(": ")
                printed[name] = value.strip()
            yield process, printed
        finally:
            process.kill()


def test_command_says_how_to_join_and_ends_on_a_signal(tmp_path: Path) -> None:
    arguments = ("--listen", "127.0.0.1:0", "--tls-dir", f"{tmp_path}/tls", "--admin-socket", f"{tmp_path}/admin.sock")
    with started(*arguments) as (process, printed):
        trusting = ssl.create_default_context(cafile=printed["ca file"])
        asyncio.run(register(printed["url"], printed["token"], "alpha", trusting))
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert printed["token"] not in output + errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tls"]


def test_command_survives_its_own_sudden_death(tmp_path: Path) -> None:
    state, admin_socket = f"{tmp_path}/state", f"{tmp_path}/admin.sock"
    arguments = ["--http", "--listen", "127.0.0.1:0", "--state-file", state, "--admin-socket", admin_socket]
    arguments += ["--token", "given"]
    with started(*arguments) as (process, printed):
        assert "token" not in printed
        identity = asyncio.run(register(printed["url"], "given", "alpha"))
        process.kill()
        process.wait()
    with started(*arguments) as (_process, printed):
        with httpx.Client(transport=httpx.HTTPTransport(uds=admin_socket), base_url="http://admin") as admin:
            assert [node["id"] for node in admin.get("/nodes").json()] == [identity["node_id"]]
        with pytest.raises(AssertionError, match="already used"):
            asyncio.run(register(printed["url"], "given", "beta"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--listen", "8443"), "give HOST:PORT"),
        (("--listen", "192.0.2.1:8443", "--http"), "cannot listen on 192.0.2.1:8443"),
        (("--mesh-cidr", "10.0.0.1/33", "--http"), "--mesh-cidr 10.0.0.1/33"),
        (("--tls-dir", "/proc/nowhere"), "cannot keep certificates in /proc/nowhere"),
        (("--state-file", "/proc/nowhere/state", "--http"), "cannot write /proc/nowhere/state"),
        (("--admin-socket", "/proc/nowhere", "--http", "--listen", "127.0.0.1:0"), "cannot listen on /proc/nowhere"),
    ],
)
def test_unusable_option_is_one_sentence_and_the_code_for_configuration(
    arguments: tuple[str, ...], sentence: str
) -> None:
    command = [sys.executable, "-m", "plexd", "lab", "controlplane", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == ConfigError.exit_code
    assert sentence in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_state_file_of_another_kind_is_refused_without_showing_it(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text('{"secret": "hush"}')
    with pytest.raises(ConfigError, match="is no state file of this version") as caught:
        LabControlPlane(state_file=path)
    assert "hush" not in str(caught.value)
