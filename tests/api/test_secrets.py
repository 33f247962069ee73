"""Reading secrets through the node API: the way to the control plane is real, what it answers is chosen here."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr
from structlog.testing import capture_logs

from plexd.api.routes import Right
from plexd.api.secrets import FETCHES_AT_ONCE, SecretRead, SecretRoutes
from plexd.control import ControlPlane
from plexd.wire.models import SecretResponse
from tests.api.asking import Answer, Desk
from tests.virtual_time import run_virtual

NSK = "QEFCQ0RFRkdISUpLTE1OT1BRUlNUVVZXWFlaW1xdXl8="
VECTOR = {
    "key": "db-pass",
    "nonce": "oKGio6Slpqeoqaqr",
    "ciphertext": "p+4zCs+cX5sLC1hB+lNYWHM7u/fR6ZvQfTg=",
    "version": 2,
}
PLAINTEXT = "pa55-wörd"

Reply = httpx.Response | Exception | Callable[[], Awaitable[httpx.Response]]


def sealed(plaintext: bytes, key: str = "db-pass", nsk: str = NSK) -> dict[str, Any]:
    nonce = os.urandom(12)
    ciphertext = AESGCM(base64.b64decode(nsk)).encrypt(nonce, plaintext, None)
    texts = {"nonce": base64.b64encode(nonce).decode(), "ciphertext": base64.b64encode(ciphertext).decode()}
    return {"key": key, "version": 7, **texts}


class World:
    """A registered node; `reply` is what the control plane says, `paths` what it was asked."""

    def __init__(self, reply: Reply, nsk: str = NSK) -> None:
        self.reply = reply
        self.nsk = nsk
        self.paths: list[str] = []
        self.reads: list[SecretRead] = []
        self.open = self.most_open = 0
        self._client = ControlPlane(
            "http://127.0.0.1:1", ssl.create_default_context(), transport=httpx.MockTransport(self._answer)
        )
        self._client.use_identity(lambda: "n_41c9", lambda: SecretStr("node-key"), lambda _: None)
        self.is_registered = True
        self.routes = SecretRoutes(lambda: self if self.is_registered else None)
        self.routes.on_read.append(self._note)
        self.desk = Desk(self.routes.table(), Right.READ, Right.SECRET)

    async def _note(self, read: SecretRead) -> None:
        self.reads.append(read)

    def node_secret_key(self) -> str:
        return self.nsk

    async def fetch(self, key: str) -> SecretResponse:
        return await self._client.secret(key)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.raw_path.decode())
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        try:
            if isinstance(self.reply, Exception):
                raise self.reply
            return self.reply if isinstance(self.reply, httpx.Response) else await self.reply()
        finally:
            self.open -= 1

    async def read(self, key: str = "db-pass") -> Answer:
        return await self.desk.ask("GET", f"/v1/state/secrets/{key}")


def play(
    world: World,
    scene: Callable[[World], Coroutine[Any, Any, None]],
    run: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run,
) -> None:
    run(scene(world))


def ask_once(reply: Reply, key: str = "db-pass", nsk: str = NSK) -> tuple[Answer, World]:
    async def main() -> tuple[Answer, World]:
        world = World(reply, nsk)
        return await world.read(key), world

    return asyncio.run(main())


def test_vector_of_the_contract() -> None:
    answer, world = ask_once(httpx.Response(200, json=VECTOR))
    assert (answer.status, answer.json) == (200, {"key": "db-pass", "value": PLAINTEXT, "version": 2})
    assert world.paths == ["/v1/nodes/n_41c9/secrets/db-pass"]
    assert world.reads == [SecretRead("db-pass", 2, 1000, 1000, 4711, "ok")]


def test_bytes_that_are_no_text_come_as_base64() -> None:
    answer, _ = ask_once(httpx.Response(200, json=sealed(b"\xff\x00")))
    assert answer.json == {"key": "db-pass", "value": "/wA=", "encoding": "base64", "version": 7}


def test_empty_secret_is_a_secret() -> None:
    assert ask_once(httpx.Response(200, json=sealed(b"")))[0].json["value"] == ""


@pytest.mark.parametrize(("asked", "key", "sent"), [("a%2Fb", "a/b", "a%2Fb"), ("%C3%BC", "ü", "%C3%BC")])
def test_key_is_encoded_on_its_way(asked: str, key: str, sent: str) -> None:
    answer, world = ask_once(httpx.Response(200, json=sealed(b"x", key)), asked)
    assert (answer.json["key"], answer.json["value"]) == (key, "x")
    assert world.paths == [f"/v1/nodes/n_41c9/secrets/{sent}"]


GIVEN = {name: value for name, value in VECTOR.items() if name != "key"}
MAPPING: list[tuple[str, Reply, int, str]] = [
    ("403", httpx.Response(403, json={"value": PLAINTEXT}), 403, "secret_forbidden"),
    ("404", httpx.Response(404), 404, "not_found"),
    *((str(n), httpx.Response(n), 503, "control_plane_unavailable")
      for n in (302, 400, 401, 408, 409, 410, 413, 418, 422, 500, 502, 503, 504)),
    ("network", httpx.ConnectError("no route"), 503, "control_plane_unavailable"),
    ("not JSON", httpx.Response(200, content=b"<html>"), 503, "control_plane_unavailable"),
    ("empty", httpx.Response(200, content=b""), 503, "control_plane_unavailable"),
    ("not an object", httpx.Response(200, json=[1]), 503, "control_plane_unavailable"),
    ("wrong type", httpx.Response(200, json={**VECTOR, "version": "2"}), 503, "control_plane_unavailable"),
    ("other key", httpx.Response(200, json={**VECTOR, "key": "db-pass2"}), 502, "secret_mismatch"),
    ("no key", httpx.Response(200, json=GIVEN), 502, "secret_mismatch"),
    ("tag", httpx.Response(200, json={**VECTOR, "ciphertext": "q" + str(VECTOR["ciphertext"])[1:]}),
     500, "decryption_failed"),
    ("cut", httpx.Response(200, json={**VECTOR, "ciphertext": "p+4z"}), 500, "decryption_failed"),
    ("no base64", httpx.Response(200, json={**VECTOR, "ciphertext": "päss"}), 500, "decryption_failed"),
    ("nonce of 11", httpx.Response(200, json={**VECTOR, "nonce": base64.b64encode(bytes(11)).decode()}),
     500, "decryption_failed"),
    ("no nonce", httpx.Response(200, json={**VECTOR, "nonce": None}), 500, "decryption_failed"),
    ("other NSK", httpx.Response(200, json=sealed(b"x", nsk=base64.b64encode(bytes(32)).decode())),
     500, "decryption_failed"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "status", "code"), [row[1:] for row in MAPPING], ids=[row[0] for row in MAPPING])
def test_failure_is_told_apart_as_the_contract_says(reply: Reply, status: int, code: str) -> None:
    answer, world = ask_once(reply)
    assert (answer.status, answer.code) == (status, code)
    assert set(answer.json) == {"error", "code"}
    assert len(world.paths) == 1, "one try"
    assert [read.outcome for read in world.reads] == [code]


def test_every_cause_of_a_failed_decryption_sounds_the_same() -> None:
    texts = {ask_once(reply)[0].text for _, reply, status, code in MAPPING if code == "decryption_failed"}
    assert len(texts) == 1


def test_wait_that_the_control_plane_asks_for_is_passed_on() -> None:
    answer, _ = ask_once(httpx.Response(429, headers={"retry-after": "17"}))
    assert (answer.status, answer.code) == (503, "control_plane_unavailable")
    assert answer.headers["Retry-After"] == "17"


@pytest.mark.parametrize("nsk", ["", "x", NSK[:-4], base64.b64encode(bytes(31)).decode(), "A" * 44, NSK + "\n"])
def test_key_that_is_not_32_bytes_of_base64_decrypts_nothing(nsk: str) -> None:
    """44 characters are no key: it is 32 bytes once decoded, or none."""
    answer, world = ask_once(httpx.Response(200, json=VECTOR), nsk=nsk)
    assert (answer.status, answer.code) == (503, "nsk_unavailable")
    assert world.paths == []


@pytest.mark.parametrize("key", ["", ".", "..", "%2E%2E", "%00", "a%0Ab", "%FF", "x" * 254, "%C2%85"])
def test_illegal_key_is_refused_without_a_call(key: str) -> None:
    answer, world = ask_once(httpx.Response(200, json=VECTOR), key)
    assert (answer.status, answer.code) == (400, "invalid_key")
    assert world.paths == []


def test_without_identity_there_is_no_secret_yet() -> None:
    async def scene(world: World) -> None:
        world.is_registered = False
        assert (await world.read()).code == "control_plane_unavailable"
        world.is_registered = True
        assert (await world.read()).status == 200

    play(World(httpx.Response(200, json=VECTOR)), scene)


def test_who_may_not_is_refused_without_a_call() -> None:
    async def scene(world: World) -> None:
        world.desk.guard.rights.discard(Right.SECRET)
        assert (await world.read()).status == 403
        assert (world.paths, world.reads) == ([], [])

    play(World(httpx.Response(200, json=VECTOR)), scene)


def test_control_plane_that_says_nothing_is_given_ten_seconds() -> None:
    async def never() -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def scene(world: World) -> None:
        assert (await world.read()).code == "control_plane_unavailable"
        assert asyncio.get_running_loop().time() == 10
        assert world.open == 0

    play(World(never), scene, run_virtual)


def test_caller_that_leaves_cancels_the_call() -> None:
    async def never() -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def scene(world: World) -> None:
        reading = asyncio.create_task(world.read())
        await asyncio.sleep(1)
        assert world.open == 1
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
        await asyncio.sleep(0.1)
        assert world.open == 0
        assert world.reads == [SecretRead("db-pass", None, 1000, 1000, 4711, "left")]

    play(World(never), scene, run_virtual)


def test_a_few_at_once_and_who_waits_longer_than_five_seconds_is_told() -> None:
    async def slow() -> httpx.Response:
        await asyncio.sleep(4)
        return httpx.Response(200, json=VECTOR)

    async def scene(world: World) -> None:
        answers = await asyncio.gather(*(world.read() for _ in range(3 * FETCHES_AT_ONCE)))
        assert sorted(answer.status for answer in answers) == [200] * 2 * FETCHES_AT_ONCE + [503] * FETCHES_AT_ONCE
        assert world.most_open == FETCHES_AT_ONCE <= 8

    play(World(slow), scene, run_virtual)


def test_callers_share_nothing() -> None:
    async def scene(world: World) -> None:
        for _ in range(3):
            await world.read()
        await asyncio.gather(world.read(), world.read())
        assert len(world.paths) == 5

    play(World(httpx.Response(200, json=VECTOR)), scene)


def test_what_is_told_of_a_read_never_holds_the_value() -> None:
    with capture_logs() as records:
        for reply in (httpx.Response(200, json=VECTOR), *(row[1] for row in MAPPING)):
            ask_once(reply)
    text = json.dumps(records, default=repr)
    assert "pa55" not in text
    assert str(VECTOR["ciphertext"]) not in text
    assert NSK not in text
    (read,) = [record for record in records if record["event"] == "secret read" and record["outcome"] == "ok"]
    assert read == {
        "component": "api", "event": "secret read", "log_level": "info",
        "key": "db-pass", "version": 2, "uid": 1000, "pid": 4711, "outcome": "ok",
    }  # fmt: skip
