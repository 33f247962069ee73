"""From a token to an identity: every answer, every wait in virtual time, and the order in which things are kept."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from plexd.config.load import load
from plexd.config.models import Config
from plexd.control import ControlPlane
from plexd.errors import FatalError, LocalStateError, RegistrationRefused, RegistrationTimedOut
from plexd.identity import join_and_leave
from plexd.identity.enrolment import TokenSearch, load_or_register, make_registrar
from plexd.mesh.keys import PrivateKey
from plexd.node.control_calls import SelfDescription
from plexd.store.files import DataDirectory
from plexd.store.identity import Identity, IdentityStore
from plexd.store.snapshot import SnapshotStore
from tests.node_harness import OLD_KEY, lowest, middle, public, signing_text, wire_peer
from tests.virtual_time import run_virtual

pytestmark = pytest.mark.virtual_time

TOKEN = "token-of-the-stage"
NODE_KEY = base64.b64encode(bytes([7] * 32)).decode()
ANSWER = {
    "node_id": "n_1", "mesh_ip": "10.100.0.1", "signing_public_key": signing_text(OLD_KEY),
    "node_secret_key": NODE_KEY, "peers": [wire_peer(2)],
}  # fmt: skip
Answer = dict[str, Any] | int | tuple[int, dict[str, str]] | Exception | bytes


@dataclass
class Registry:
    """A control plane that answers registration n (from 1) with `script(n)`: a body, a status, an error."""

    script: Callable[[int], Answer]
    times: list[float] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("POST", "/v1/register")
        self.times.append(asyncio.get_running_loop().time())
        self.requests.append(json.loads(request.content))
        self.authorizations.append(request.headers["authorization"])
        answer = self.script(len(self.times))
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, dict):
            return httpx.Response(201, json=answer)
        if isinstance(answer, bytes):
            return httpx.Response(201, content=answer)
        status, headers = answer if isinstance(answer, tuple) else (answer, {})
        return httpx.Response(status, headers=headers, text="said by the control plane")


def config_for(directory: Path, **flags: str) -> Config:
    given = {"api": "http://127.0.0.1:1", "data_dir": str(directory / "data"), "token.file": str(directory / "token")}
    return load(given | flags, {}, command="join").config


async def attempt(
    directory: Path, registry: Registry, uniform: Callable[[float, float], float] = middle, **flags: str
) -> Identity:
    config = config_for(directory, **flags)
    opened = DataDirectory(config.data_dir)
    transport = httpx.MockTransport(registry)
    control = ControlPlane("http://127.0.0.1:1", ssl.create_default_context(), uniform=uniform, transport=transport)
    identities, description = IdentityStore(opened), SelfDescription("here", {}, "1", "")
    registrar = make_registrar(lambda: config, control, description, identities, SnapshotStore(opened))
    try:
        return await load_or_register(config, identities, registrar, TokenSearch(lambda: config.token, {}))
    finally:
        await control.close()
        opened.close()


def register(directory: Path, registry: Registry, **options: Any) -> Identity:
    return run_virtual(attempt(directory, registry, **options))


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text(TOKEN)
    return path


def key_in(path: Path) -> str:
    return str(PrivateKey.parse(path.read_text()).public())


# --- success


def test_registration_leaves_an_identity_and_the_peers_and_takes_the_token_file(
    tmp_path: Path, token_file: Path
) -> None:
    registry = Registry(lambda _: ANSWER)
    identity = register(tmp_path, registry)
    assert identity.node_id == "n_1"
    (request,) = registry.requests
    assert (request["token"], request["hostname"]) == (TOKEN, "here")
    assert request["metadata"].keys() == {"os", "arch", "kernel"}
    assert request["public_key"] == key_in(tmp_path / "data/private_key")
    assert registry.authorizations == [f"Bearer {TOKEN}"]
    assert not token_file.exists()
    assert not (tmp_path / "data/private_key.pending").exists()
    opened = DataDirectory(tmp_path / "data")
    assert IdentityStore(opened).load() == identity
    keys = IdentityStore(opened).load_signing_keys()
    assert keys is not None
    assert keys.current == public(OLD_KEY)
    assert set(SnapshotStore(opened).load("n_1").desired.peers) == {"n_2"}
    opened.close()


def test_second_start_makes_no_call_and_leaves_a_token_file_alone(tmp_path: Path, token_file: Path) -> None:
    first = register(tmp_path, Registry(lambda _: ANSWER))
    token_file.write_text("another")
    registry = Registry(lambda _: 500)
    with capture_logs() as lines:
        assert register(tmp_path, registry) == first
    assert registry.times == []
    assert token_file.read_text() == "another"
    assert [line["event"] for line in lines] == ["token file is not needed, the node is registered"]


def test_second_start_does_not_end_over_a_token_file_that_cannot_be_looked_at(tmp_path: Path, token_file: Path) -> None:
    first = register(tmp_path, Registry(lambda _: ANSWER))
    impossible = token_file.with_name("x" * 300)
    with capture_logs() as lines:
        assert register(tmp_path, Registry(lambda _: 500), **{"token.file": str(impossible)}) == first
    (line,) = lines
    assert (line["log_level"], line["path"], line["reason"]) == ("warning", str(impossible), "File name too long")


def test_token_file_that_was_not_used_stays(tmp_path: Path, token_file: Path) -> None:
    register(tmp_path, Registry(lambda _: ANSWER), **{"token.value": "from-elsewhere"})
    assert token_file.exists()


def test_token_file_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == token_file:
            raise PermissionError(30, "Read-only file system")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with capture_logs() as lines:
        register(tmp_path, Registry(lambda _: ANSWER))
    assert [line["log_level"] for line in lines if line["event"] == "used token file not removed"] == ["warning"]


def test_identity_file_is_written_last(tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    rename, unlink = Path.rename, Path.unlink

    def note_rename(path: Path, target: Path) -> Path:
        written.append(target.name)
        return rename(path, target)

    def note_unlink(path: Path, missing_ok: bool = False) -> None:
        written.append(f"not {path.name}")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(Path, "unlink", note_unlink)
    register(tmp_path, Registry(lambda _: ANSWER))
    assert written == [
        "private_key.pending", "private_key", "node_secret_key", "signing_keys.json", "signing_public_key",
        "desired.json", "metadata.json", "secrets.json", "identity.json", "not token",
    ]  # fmt: skip


# --- what ends it


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 410, 413, 418, 422, 501])
def test_permanent_status_ends_it_at_once(tmp_path: Path, token_file: Path, status: int) -> None:
    registry = Registry(lambda _: status)
    with pytest.raises(RegistrationRefused) as caught:
        register(tmp_path, registry)
    assert len(registry.times) == 1
    assert "said by the control plane" in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert token_file.exists()
    assert not (tmp_path / "data/identity.json").exists()


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(401, "invalid, expired or already used"), (409, "host name is already registered")],
)
def test_sentence_says_what_to_do(tmp_path: Path, token_file: Path, status: int, sentence: str) -> None:
    with pytest.raises(RegistrationRefused, match=sentence):
        register(tmp_path, Registry(lambda _: status))


@pytest.mark.parametrize(
    ("member", "value"),
    [("node_id", ""), ("node_id", None), ("node_id", "."), ("mesh_ip", ""), ("mesh_ip", "10.1"),
     ("mesh_ip", "10.100.0.300"), ("node_secret_key", ""), ("node_secret_key", None), ("node_secret_key", "a b"),
     ("node_secret_key", "x" * 513)],
)  # fmt: skip
def test_answer_without_a_usable_member_is_refused_and_says_which(
    tmp_path: Path, token_file: Path, member: str, value: str | None
) -> None:
    registry = Registry(lambda _: ANSWER | {member: value})
    with pytest.raises(RegistrationRefused, match=member):
        register(tmp_path, registry)
    assert len(registry.times) == 1
    assert (tmp_path / "data/private_key.pending").exists()
    assert token_file.exists()


@pytest.mark.parametrize("key", ["", None, "AAAA", "x" * 44])
def test_bad_signing_key_costs_the_events_and_not_the_identity(
    tmp_path: Path, token_file: Path, key: str | None
) -> None:
    assert register(tmp_path, Registry(lambda _: ANSWER | {"signing_public_key": key})).node_id == "n_1"
    opened = DataDirectory(tmp_path / "data")
    assert IdentityStore(opened).load_signing_keys() is None
    opened.close()


# --- what is tried again


@pytest.mark.parametrize(
    "failure",
    [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), 408, 425, 500, 502, 503, 302, b"", b"{", b"<html>"],
    ids=str,
)
def test_passing_failure_is_tried_again_with_the_same_key(tmp_path: Path, token_file: Path, failure: Answer) -> None:
    registry = Registry(lambda n: failure if n <= 3 else ANSWER)
    register(tmp_path, registry)
    assert registry.times == pytest.approx([0, 1, 3, 7])
    assert {request["public_key"] for request in registry.requests} == {key_in(tmp_path / "data/private_key")}


def test_delays_double_up_to_a_minute_until_five_minutes_are_over(tmp_path: Path, token_file: Path) -> None:
    registry = Registry(lambda _: 500)
    with pytest.raises(RegistrationTimedOut):
        register(tmp_path, registry)
    assert registry.times == pytest.approx([0, 1, 3, 7, 15, 31, 63, 123, 183, 243])


@pytest.mark.parametrize(("limit", "times"), [("10s", [0, 1, 3, 7]), ("1m", [0, 1, 3, 7, 15, 31])])
def test_time_limit_is_for_the_start_of_the_last_attempt(
    tmp_path: Path, token_file: Path, limit: str, times: list[float]
) -> None:
    registry = Registry(lambda _: 500)
    with pytest.raises(RegistrationTimedOut):
        register(tmp_path, registry, **{"registration.retry_for": limit})
    assert registry.times == pytest.approx(times)
    assert token_file.exists()


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("header", "seconds"), [("20", 20), ("0", 1), ("nonsense", 0.75), ("-5", 0.75)])
def test_retry_after_is_waited_for(tmp_path: Path, token_file: Path, status: int, header: str, seconds: float) -> None:
    registry = Registry(lambda n: (status, {"retry-after": header}) if n == 1 else ANSWER)
    register(tmp_path, registry, uniform=lowest)
    assert registry.times[1] == pytest.approx(seconds)


def test_retry_after_beyond_the_time_limit_ends_it(tmp_path: Path, token_file: Path) -> None:
    registry = Registry(lambda _: (429, {"retry-after": "3600"}))
    with pytest.raises(RegistrationTimedOut):
        register(tmp_path, registry)
    assert len(registry.times) == 1


def test_next_start_offers_the_same_key(tmp_path: Path, token_file: Path) -> None:
    registry = Registry(lambda n: ANSWER if n == 2 else 401)
    with pytest.raises(RegistrationRefused):
        register(tmp_path, registry)
    register(tmp_path, registry)
    assert len({request["public_key"] for request in registry.requests}) == 1


async def test_cancelled_attempt_leaves_the_pending_key(tmp_path: Path, token_file: Path) -> None:
    task = asyncio.create_task(attempt(tmp_path, Registry(lambda _: 500)))
    await asyncio.sleep(20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    pending = key_in(tmp_path / "data/private_key.pending")
    registry = Registry(lambda _: ANSWER)
    await attempt(tmp_path, registry)
    assert registry.requests[0]["public_key"] == pending


# --- the disk


def test_disk_that_refuses_the_key_sends_nothing(
    tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    registry = Registry(lambda _: ANSWER)
    monkeypatch.setattr("plexd.store.identity.write_whole", full)
    with pytest.raises(LocalStateError, match="nothing was sent"):
        register(tmp_path, registry)
    assert registry.times == []


def test_disk_that_refuses_the_identity_keeps_key_and_token_file(
    tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    registry = Registry(lambda _: ANSWER)
    monkeypatch.setattr("plexd.store.snapshot.write_whole", full)
    with pytest.raises(LocalStateError, match="token may be used up"):
        register(tmp_path, registry)
    monkeypatch.undo()
    assert token_file.exists()
    register(tmp_path, registry)
    assert len({request["public_key"] for request in registry.requests}) == 1


def test_damaged_identity_without_a_token_is_fatal_and_says_so(tmp_path: Path, token_file: Path) -> None:
    register(tmp_path, Registry(lambda _: ANSWER))
    (tmp_path / "data/identity.json").write_text("{")
    with pytest.raises(LocalStateError, match=r"damaged.*bootstrap token"):
        register(tmp_path, Registry(lambda _: ANSWER))


def test_damaged_identity_with_a_token_registers_anew(tmp_path: Path, token_file: Path) -> None:
    register(tmp_path, Registry(lambda _: ANSWER))
    (tmp_path / "data/node_secret_key").unlink()
    token_file.touch(0o600)
    token_file.write_text(TOKEN)
    assert register(tmp_path, Registry(lambda _: ANSWER | {"node_id": "n_9"})).node_id == "n_9"
    assert list((tmp_path / "data").glob("identity.json.corrupt-*"))


@pytest.mark.parametrize("name", ["identity.json", "node_secret_key", "private_key"])
def test_file_that_cannot_be_read_never_leads_to_a_registration(tmp_path: Path, token_file: Path, name: str) -> None:
    register(tmp_path, Registry(lambda _: ANSWER))
    token_file.touch(0o600)
    token_file.write_text(TOKEN)
    (tmp_path / "data" / name).unlink()
    (tmp_path / "data" / name).mkdir()
    registry = Registry(lambda _: ANSWER)
    with pytest.raises(FatalError, match=name):
        register(tmp_path, registry)
    assert registry.times == []


def join_anew(directory: Path) -> None:
    given = {"api": "http://127.0.0.1:9", "data_dir": str(directory / "data"), "hostname": "h"}
    join_and_leave.join(load(given, {}, command="join"), token_text=TOKEN, ask=None, force=True)


@pytest.fixture
def registered(tmp_path: Path, token_file: Path) -> None:
    register(tmp_path, Registry(lambda _: ANSWER))


@pytest.mark.usefixtures("registered", "own_logging")
def test_joining_anew_on_a_disk_that_refuses_the_key_keeps_the_old_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as disk:
        disk.setattr("plexd.store.identity.write_whole", refuse)
        with pytest.raises(LocalStateError, match="nothing was sent"):
            join_anew(tmp_path)
    opened = DataDirectory(tmp_path / "data")
    identity = IdentityStore(opened).load()
    opened.close()
    assert identity is not None
    assert identity.node_id == "n_1"


@pytest.mark.usefixtures("registered", "own_logging")
def test_joining_anew_does_not_put_the_old_identity_over_one_that_was_granted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    granting = httpx.MockTransport(Registry(lambda _: ANSWER | {"node_id": "n_2"}))

    def control_plane(_: Config) -> ControlPlane:
        return ControlPlane("http://127.0.0.1:9", ssl.create_default_context(), transport=granting)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(join_and_leave, "make_control_plane", control_plane)
        patched.setattr(IdentityStore, "commit_mark", refuse)
        with pytest.raises(LocalStateError, match="registered as n_2"):
            join_anew(tmp_path)
    assert not (tmp_path / "data" / "identity.json").exists()
