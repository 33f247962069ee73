"""The control plane over real sockets: every call, every refusal, the stream, and every fault as a client meets it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from plexd.errors import ConfigError
from plexd.lab.controlplane import Effect, Fault, LabControlPlane
from plexd.lab.controlplane.faults import RESPONSE_LIMIT
from plexd.mesh.desired import SigningKeys
from plexd.mesh.keys import PrivateKey
from plexd.wire import endpoints, sse
from plexd.wire.endpoints import AnswerBody, Endpoint
from plexd.wire.envelope import Outcome, Verifier

NOW = "2026-03-01T09:15:00.25Z"
CHECKSUM = "sha256:" + "0a" * 32


def run(test: Callable[[LabControlPlane], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with LabControlPlane(**options) as plane:
            await test(plane)

    asyncio.run(main())


def headers_for(endpoint: Endpoint, credential: str) -> dict[str, str]:
    unpacked = endpoint.answer in {AnswerBody.EVENT_STREAM, AnswerBody.OCTETS}
    accept = {AnswerBody.EVENT_STREAM: "text/event-stream", AnswerBody.OCTETS: "application/octet-stream"}
    headers = {
        "authorization": f"Bearer {credential}",
        "user-agent": "plexd/0.1.0",
        "accept": accept.get(endpoint.answer, "application/json"),
        "accept-encoding": "identity" if unpacked else "gzip",
    }
    if endpoint.request is not None:
        headers["content-type"] = "application/json"
    if endpoint.answer is AnswerBody.EVENT_STREAM:
        headers["cache-control"] = "no-cache"
    return headers


class Agent:
    """Speaks the wire as an agent should, unless a call is told otherwise."""

    def __init__(self, plane: LabControlPlane, name: str, verify: ssl.SSLContext | bool = False) -> None:
        self.plane = plane
        self.name = name
        self.public_key = str(PrivateKey.generate().public())
        self.token = plane.admin.issue_token()
        self.node_key = ""
        self.identity: dict[str, Any] = {}
        self.http = httpx.AsyncClient(base_url=plane.url, verify=verify, trust_env=False, headers={})

    async def __aenter__(self) -> Agent:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    @property
    def node_id(self) -> str:
        return str(self.identity["node_id"])

    async def register(self) -> None:
        answer = await self.call(endpoints.REGISTER, self.registration())
        assert answer.status_code == 201, answer.text
        self.identity = answer.json()
        self.node_key = self.identity["node_secret_key"]

    def registration(self) -> dict[str, Any]:
        return {"token": self.token, "public_key": self.public_key, "hostname": self.name}

    def request(
        self,
        endpoint: Endpoint,
        body: Any = None,
        *,
        headers: Mapping[str, str | None] | None = None,
        raw: bytes | None = None,
        **parameters: str,
    ) -> httpx.Request:
        credential = self.token if endpoint is endpoints.REGISTER else self.node_key
        sent: dict[str, str | None] = dict(headers_for(endpoint, credential))
        content = raw
        if content is None and endpoint.request is not None:
            content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
            if endpoint.always_gzip or len(content) > 1024:
                content = gzip.compress(content)
                sent["content-encoding"] = "gzip"
        sent |= headers or {}
        path = endpoint.path(**({"node_id": self.node_id} if "{node_id}" in endpoint.template else {}), **parameters)
        return httpx.Request(
            endpoint.method,
            f"{self.plane.url}{path}",
            headers={name: value for name, value in sent.items() if value is not None},
            content=content,
        )

    async def call(self, endpoint: Endpoint, body: Any = None, **options: Any) -> httpx.Response:
        return await self.http.send(self.request(endpoint, body, **options))

    @contextlib.asynccontextmanager
    async def events(self, last_event_id: str | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        request = self.request(endpoints.EVENTS, headers={"last-event-id": last_event_id})
        answer = await self.http.send(request, stream=True)
        assert answer.status_code == 200
        try:
            yield answer.aiter_raw()
        finally:
            await answer.aclose()


@contextlib.asynccontextmanager
async def two_nodes(plane: LabControlPlane) -> AsyncIterator[tuple[Agent, Agent]]:
    async with Agent(plane, "alpha") as alpha, Agent(plane, "beta") as beta:
        await alpha.register()
        await beta.register()
        yield alpha, beta


async def next_items(chunks: AsyncIterator[bytes], count: int, decoder: sse.Decoder | None = None) -> list[sse.Item]:
    decoder = decoder or sse.Decoder()
    items: list[sse.Item] = []
    async with asyncio.timeout(10):
        while len(items) < count:
            items += decoder.feed(await anext(chunks))
    return items


def verifier(agent: Agent) -> Verifier:
    return Verifier(SigningKeys(base64.b64decode(agent.identity["signing_public_key"])))


def judge(checks: Verifier, item: sse.Item) -> Outcome:
    assert isinstance(item, sse.Event)
    return checks.verify(item.data, now=time.time(), monotonic=time.monotonic()).outcome


# --- the calls -------------------------------------------------------------------------------------------------------

TRIGGERED_BY = {"type": "control_plane", "session_id": "", "user_id": "", "email": ""}
PARAMETER = {"name": "force", "type": "bool", "required": False, "description": "even if busy"}
HEARTBEAT = {
    "node_id": "<node>", "timestamp": NOW, "status": "healthy", "uptime": "1m30s", "binary_checksum": CHECKSUM
}  # fmt: skip
CAPABILITIES = {
    "binary": {"version": "0.1.0", "checksum": CHECKSUM},
    "builtin_actions": [{"name": "ping", "description": "", "parameters": [PARAMETER]}],
    "hooks": [],
}
RESULT = {
    "execution_id": "e/1", "status": "success", "exit_code": 0, "stdout": "é\n", "stderr": "", "duration": "350ms",
    "finished_at": NOW, "triggered_by": TRIGGERED_BY,
}  # fmt: skip
LOG = {"timestamp": NOW, "source": "journal", "unit": "a.service", "message": "m", "severity": "info", "hostname": "h"}
AUDIT = {
    "timestamp": NOW, "source": "auditd", "event_type": "login", "subject": {"uid": 0}, "object": {}, "action": "a",
    "result": "success", "hostname": "h", "raw": "",
}  # fmt: skip
REPORT_ENTRY = {
    "key": "k", "content_type": "application/json", "payload": {"n": 1.0}, "version": 1, "updated_at": NOW
}  # fmt: skip

GOOD: list[tuple[Endpoint, Any, dict[str, str], int]] = [
    (endpoints.HEARTBEAT, HEARTBEAT, {}, 200),
    (endpoints.HEARTBEAT, HEARTBEAT | {
        "mesh": {"interface": "plexd0", "peer_count": 1, "listen_port": 51820},
        "nat": {"public_endpoint": "192.0.2.1:51820", "type": "none"},
    }, {}, 200),
    (endpoints.DEREGISTER, None, {}, 204),
    (endpoints.ROTATE_KEYS, {"node_id": "<node>", "new_public_key": "<key>"}, {}, 200),
    (endpoints.CAPABILITIES, CAPABILITIES, {}, 204),
    (endpoints.ENDPOINT, {"public_endpoint": "192.0.2.1:51820", "nat_type": "none"}, {}, 200),
    (endpoints.STATE, None, {}, 200),
    (endpoints.DRIFT, {"timestamp": NOW, "corrections": [{"type": "peer_added", "detail": "peer n_1"}]}, {}, 204),
    (endpoints.SECRET, None, {"key": "db/pass ü"}, 200),
    (endpoints.REPORT, {"entries": [REPORT_ENTRY], "deleted": ["gone"]}, {}, 204),
    (endpoints.ACK, {"execution_id": "e/1", "status": "accepted", "reason": ""}, {"execution_id": "e/1"}, 204),
    (endpoints.RESULT, RESULT, {"execution_id": "e/1"}, 204),
    (endpoints.METRICS, [{"timestamp": NOW, "group": "cpu", "data": {"load": 0.5}}], {}, 202),
    (endpoints.LOGS, [LOG], {}, 202),
    (endpoints.AUDIT, [AUDIT], {}, 202),
    (endpoints.ARTIFACT, None, {"version": "1.2.3", "os": "linux", "arch": "amd64"}, 200),
    (endpoints.PING, None, {}, 204),
    (endpoints.TUNNEL_READY, {"listen_addr": "10.100.0.2:40122", "timestamp": NOW}, {"session_id": "s1"}, 204),
    (endpoints.TUNNEL_CLOSED, {"reason": "expired", "duration": "12m4s", "timestamp": NOW}, {"session_id": "s1"}, 204),
    (endpoints.INTEGRITY_VIOLATION, {
        "type": "hook", "path": "/h", "expected_checksum": CHECKSUM, "actual_checksum": CHECKSUM, "detail": "",
        "timestamp": NOW,
    }, {}, 204),
]  # fmt: skip


def filled(body: Any, agent: Agent) -> Any:
    text = json.dumps(body).replace("<node>", agent.node_id).replace("<key>", str(PrivateKey.generate().public()))
    return json.loads(text)


def test_every_call_of_the_table_is_covered_here() -> None:
    covered = {endpoint.name for endpoint, *_ in GOOD} | {"register", "events"}
    assert covered == {endpoint.name for endpoint in (*endpoints.ENDPOINTS, *endpoints.EXTENSIONS)}


@pytest.mark.parametrize(("endpoint", "body", "parameters", "status"), GOOD, ids=lambda v: getattr(v, "name", ""))
def test_good_request_is_answered_as_the_models_read_it(
    endpoint: Endpoint, body: Any, parameters: dict[str, str], status: int
) -> None:
    async def test(plane: LabControlPlane) -> None:
        async with two_nodes(plane) as (alpha, _beta):
            plane.admin.put_secret("alpha", "db/pass ü", b"s3cret")
            plane.admin.put_artifact("1.2.3", "amd64", b"\x7fELF")
            plane.admin.emit("alpha", "action_request", {"execution_id": "e/1", "action": "ping"})
            answer = await alpha.call(endpoint, filled(body, alpha), **parameters)
            assert (answer.status_code, answer.text if status >= 300 else "") == (status, "")
            if endpoint.response is not None:
                endpoint.response.model_validate(answer.json())
            (arrival,) = plane.admin.arrived(endpoint.name, alpha.node_id)
            assert (arrival.status, arrival.error, arrival.credential) == (status, None, "node_key")
            assert arrival.body == filled(body, alpha) or endpoint is endpoints.ROTATE_KEYS

    run(test)


BAD_BODIES: list[tuple[Endpoint, Any, str]] = [
    (endpoints.HEARTBEAT, [], "must be an object"),
    (endpoints.HEARTBEAT, {}, "node_id is missing"),
    (endpoints.HEARTBEAT, HEARTBEAT | {"status": None}, "status is null; it must have a value"),
    (endpoints.HEARTBEAT, HEARTBEAT | {"status": "fine"}, "status should be"),
    (endpoints.HEARTBEAT, HEARTBEAT | {"mesh": None}, "mesh is null; leave it out"),
    (endpoints.HEARTBEAT, HEARTBEAT | {"mesh": {}}, "mesh is empty and must be left out"),
    (endpoints.HEARTBEAT, HEARTBEAT | {"mesh": {"interface": "plexd0"}}, "mesh.peer_count is missing"),
    (endpoints.HEARTBEAT, HEARTBEAT | {"hello": 1}, "hello is not a member of HeartbeatRequest"),
    (endpoints.HEARTBEAT, HEARTBEAT | {"timestamp": "2026-03-01 09:15:00"}, "timestamp is not an RFC 3339 time"),
    (endpoints.HEARTBEAT, HEARTBEAT | {"timestamp": "2026-03-01T10:15:00+01:00"}, "timestamp must be a time in UTC"),
    (endpoints.HEARTBEAT, HEARTBEAT | {"timestamp": "2026-03-01T10:15:00.50Z"}, "without trailing zeros"),
    (endpoints.HEARTBEAT, HEARTBEAT | {"timestamp": ""}, "timestamp is not set"),
    (endpoints.HEARTBEAT, HEARTBEAT | {"uptime": 90}, "uptime should be a valid string"),
    (endpoints.HEARTBEAT, HEARTBEAT | {"uptime": "1.5s"}, "uptime must be a duration in whole seconds"),
    (endpoints.HEARTBEAT, HEARTBEAT | {"binary_checksum": "0a" * 32}, "binary_checksum must be written sha256:"),
    (endpoints.HEARTBEAT, HEARTBEAT | {"node_id": "n_other"}, "node_id in the body is not the one of the path"),
    (endpoints.ROTATE_KEYS, {"node_id": "<node>", "new_public_key": "short"}, "new_public_key is no WireGuard key"),
    (endpoints.CAPABILITIES, CAPABILITIES | {"hooks": None}, "hooks is null; it must have a value"),
    (endpoints.CAPABILITIES, CAPABILITIES | {"builtin_actions": [
        {"name": name, "description": "", "parameters": []} for name in ("b", "a")
    ]}, "builtin_actions must be sorted by name"),
    (endpoints.CAPABILITIES, CAPABILITIES | {"builtin_actions": [{"name": "a", "description": "", "parameters": [
        {"name": "p", "type": "string", "required": 1, "description": ""}
    ]}]}, "builtin_actions[0].parameters[0]"),
    (endpoints.ENDPOINT, {"public_endpoint": "192.0.2.1", "nat_type": "none"}, "public_endpoint is no endpoint"),
    (endpoints.DRIFT, {"timestamp": NOW, "corrections": []}, "corrections"),
    (endpoints.REPORT, {"entries": [REPORT_ENTRY]}, "deleted is missing"),
    (endpoints.REPORT, {"entries": [REPORT_ENTRY | {"version": 0}], "deleted": []}, "entries[0] version"),
    (endpoints.ACK, {"execution_id": "e2", "status": "accepted", "reason": ""}, "execution_id in the body"),
    (endpoints.ACK, {"execution_id": "e1", "status": "accepted", "reason": "why"}, "reason must be empty"),
    (endpoints.METRICS, [], "must be an array of at least one element"),
    (endpoints.METRICS, [{"timestamp": NOW, "group": "cpu"}], "[0].data is missing"),
    (endpoints.LOGS, [LOG, LOG | {"severity": "loud"}], "[1] LogEntry: severity should be"),
    (endpoints.AUDIT, [AUDIT | {"raw": None}], "[0].raw is null"),
]  # fmt: skip


@pytest.mark.parametrize(("endpoint", "body", "reason"), BAD_BODIES, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_body_is_refused_with_its_reason(endpoint: Endpoint, body: Any, reason: str) -> None:
    async def test(plane: LabControlPlane) -> None:
        async with Agent(plane, "alpha") as alpha:
            await alpha.register()
            parameters = {"execution_id": "e1"} if "{execution_id}" in endpoint.template else {}
            answer = await alpha.call(endpoint, filled(body, alpha), **parameters)
            assert (answer.status_code, answer.headers["content-type"]) == (400, "application/json")
            assert reason in answer.json()["error"]
            assert plane.admin.arrived(endpoint.name)[-1].error == answer.json()["error"]

    run(test)


BAD_HEADERS: list[tuple[Endpoint, dict[str, str | None], int, str]] = [
    (endpoints.STATE, {"authorization": None}, 401, "must be a bearer credential"),
    (endpoints.STATE, {"authorization": "Basic abc"}, 401, "must be a bearer credential"),
    (endpoints.STATE, {"authorization": "Bearer nobody"}, 401, "not known"),
    (endpoints.STATE, {"user-agent": "curl/8"}, 400, "User-Agent must be plexd/<version>"),
    (endpoints.STATE, {"accept": "*/*"}, 400, "Accept must be 'application/json'"),
    (endpoints.STATE, {"accept-encoding": "gzip, deflate"}, 400, "Accept-Encoding must be 'gzip'"),
    (endpoints.STATE, {"content-type": "application/json"}, 400, "Content-Type must not be sent"),
    (endpoints.HEARTBEAT, {"content-type": "text/json"}, 400, "Content-Type must be 'application/json'"),
    (endpoints.HEARTBEAT, {"content-encoding": "br"}, 415, "Content-Encoding must be gzip"),
    (endpoints.HEARTBEAT, {"content-encoding": "gzip"}, 400, "body is not gzip"),
    (endpoints.EVENTS, {"cache-control": None}, 400, "Cache-Control must be 'no-cache'"),
    (endpoints.EVENTS, {"accept-encoding": "gzip"}, 400, "Accept-Encoding must be 'identity'"),
]


@pytest.mark.parametrize(("endpoint", "headers", "status", "reason"), BAD_HEADERS)
def test_bad_header_is_refused_with_its_reason(
    endpoint: Endpoint, headers: dict[str, str | None], status: int, reason: str
) -> None:
    async def test(plane: LabControlPlane) -> None:
        async with Agent(plane, "alpha") as alpha:
            await alpha.register()
            answer = await alpha.call(endpoint, filled(HEARTBEAT, alpha), headers=headers)
            assert answer.status_code == status
            assert reason in answer.json()["error"]

    run(test)


RAW_BODIES: list[tuple[Endpoint, bytes, dict[str, str], int, str]] = [
    (endpoints.HEARTBEAT, b"{", {}, 400, "not JSON"),
    (endpoints.HEARTBEAT, b'{"a": 1}', {}, 400, "insignificant white space"),
    (endpoints.HEARTBEAT, b"\xff", {}, 400, "not UTF-8"),
    (endpoints.HEARTBEAT, b"[" * 100_000, {}, 400, "must be compressed"),
    (endpoints.HEARTBEAT, gzip.compress(b"[" * 100_000), {"content-encoding": "gzip"}, 400, "nested too deeply"),
    (endpoints.HEARTBEAT, gzip.compress(b"{}"), {"content-encoding": "gzip"}, 400, "must not be compressed"),
    (endpoints.LOGS, b"[]", {}, 400, "must be compressed"),
    (endpoints.LOGS, gzip.compress(b"[]")[:-4], {"content-encoding": "gzip"}, 400, "not one whole gzip stream"),
    (endpoints.LOGS, gzip.compress(b" " * (RESPONSE_LIMIT + 1)), {"content-encoding": "gzip"}, 413, "decompression"),
    (endpoints.LOGS, b" " * (RESPONSE_LIMIT + 1), {}, 413, "bytes"),
    (endpoints.STATE, b"{}", {}, 400, "this request has no body"),
]


@pytest.mark.parametrize(("endpoint", "raw", "headers", "status", "reason"), RAW_BODIES, ids=range(len(RAW_BODIES)))
def test_bytes_that_are_no_good_body_are_refused(
    endpoint: Endpoint, raw: bytes, headers: dict[str, str], status: int, reason: str
) -> None:
    async def test(plane: LabControlPlane) -> None:
        async with Agent(plane, "alpha") as alpha:
            await alpha.register()
            answer = await alpha.call(endpoint, raw=raw, headers=headers)
            assert answer.status_code == status
            assert reason in answer.json()["error"]

    run(test)


def test_after_415_the_same_call_may_come_uncompressed_once() -> None:
    async def test(plane: LabControlPlane) -> None:
        async with Agent(plane, "alpha") as alpha:
            await alpha.register()
            plane.admin.inject(Fault(endpoint="logs", effect=Effect.STATUS, status=415))
            assert (await alpha.call(endpoints.LOGS, [LOG])).status_code == 415
            plain = json.dumps([LOG], separators=(",", ":")).encode()
            assert (await alpha.call(endpoints.LOGS, raw=plain)).status_code == 202
            assert (await alpha.call(endpoints.LOGS, raw=plain)).status_code == 400

    run(test)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/ping", 404),
        ("DELETE", "/v1/ping", 405),
        ("GET", "/v1/ping?x=1", 404),
        ("GET", "/v1/nodes/{node_id}/secrets/a%2fb", 400),
        ("GET", "/v1/nodes/{node_id}/secrets/%2E", 400),
        ("GET", "/v1/nodes/{node_id}/secrets/%FF", 400),
        ("GET", "/v1/nodes/{node_id}/secrets/a%2Fb", 404),
        ("GET", "/v1/nodes/n_nobody/state", 404),
        ("GET", "/v1/nodes/{other}/state", 403),
    ],
)
def test_path_that_is_not_the_callers_is_refused(method: str, path: str, status: int) -> None:
    async def test(plane: LabControlPlane) -> None:
        async with two_nodes(plane) as (alpha, beta):
            url = httpx.URL(plane.url, raw_path=path.format(node_id=alpha.node_id, other=beta.node_id).encode())
            headers = headers_for(endpoints.STATE, alpha.node_key)
            answer = await alpha.http.send(httpx.Request(method, url, headers=headers))
            assert answer.status_code == status
            assert answer.json()["error"]

    run(test)


# --- registration, events --------------------------------------------------------------------------------------------


def test_credentials_never_reach_the_arrivals() -> None:
    async def test(plane: LabControlPlane) -> None:
        async with two_nodes(plane) as (alpha, _beta):
            await alpha.call(endpoints.STATE)
            await alpha.call(endpoints.STATE, headers={"authorization": f"Bearer {alpha.token}"})
            said = json.dumps([arrival.as_json() for arrival in plane.admin.arrived()])
            assert alpha.token not in said
            assert alpha.node_key not in said
            assert [a.credential for a in plane.admin.arrived()] == [
                "bootstrap_token", "bootstrap_token", "node_key", "bootstrap_token"
            ]  # fmt: skip

    run(test)


def test_token_in_body_and_header_must_agree() -> None:
    async def test(plane: LabControlPlane) -> None:
        async with Agent(plane, "alpha") as alpha:
            answer = await alpha.call(endpoints.REGISTER, alpha.registration() | {"token": "another"})
            assert (answer.status_code, answer.json()["error"]) == (400, "token and bearer credential differ")

    run(test)


def test_secret_opens_with_the_node_key() -> None:
    async def test(plane: LabControlPlane) -> None:
        async with Agent(plane, "alpha") as alpha:
            await alpha.register()
            plane.admin.put_secret("alpha", "db", b"s3cret")
            answer = (await alpha.call(endpoints.SECRET, key="db")).json()
            cipher = AESGCM(base64.b64decode(alpha.node_key))
            nonce, ciphertext = (base64.b64decode(answer[name]) for name in ("nonce", "ciphertext"))
            assert cipher.decrypt(nonce, ciphertext, None) == b"s3cret"

    run(test)


def test_events_are_signed_and_replayed_after_the_last_one_seen() -> None:
    async def test(plane: LabControlPlane) -> None:
        async with two_nodes(plane) as (alpha, beta):
            checks = verifier(alpha)
            async with alpha.events() as first, alpha.events() as second:
                await beta.call(endpoints.ENDPOINT, {"public_endpoint": "192.0.2.7:51820", "nat_type": "none"})
                (seen,), (same,) = await next_items(first, 1), await next_items(second, 1)
            assert seen == same
            assert judge(checks, seen) is Outcome.VERIFIED
            assert isinstance(seen, sse.Event)
            assert json.loads(seen.data)["payload"] == {"peer_id": beta.node_id, "endpoint": "192.0.2.7:51820"}
            plane.admin.emit("alpha", "policy_updated", None)
            plane.admin.emit("alpha", "rotate_keys", {"note": "<é>"})
            async with alpha.events(last_event_id=seen.id) as again:
                later = await next_items(again, 2)
            assert [item.type for item in later if isinstance(item, sse.Event)] == ["policy_updated", "rotate_keys"]
            assert [judge(checks, item) for item in later] == [Outcome.VERIFIED] * 2

    run(test)


def test_stream_begins_with_retry_and_keeps_alive() -> None:
    async def test(plane: LabControlPlane) -> None:
        plane.admin.set_stream(keepalive_seconds=0.05, retry_milliseconds=2000)
        async with Agent(plane, "alpha") as alpha:
            await alpha.register()
            async with alpha.events() as stream, asyncio.timeout(10):
                text = b""
                while b": keepalive\n\n" not in text:
                    text += await anext(stream)
            assert text.startswith(b": hello\nretry: 2000\n\n")

    run(test)


def test_forged_events_fail_the_check_they_aim_at() -> None:
    async def test(plane: LabControlPlane) -> None:
        async with Agent(plane, "alpha") as alpha:
            await alpha.register()
            checks = verifier(alpha)
            emit = plane.admin.emit
            async with alpha.events() as stream:
                emit("alpha", "policy_updated", nonce="n1")
                emit("alpha", "policy_updated", nonce="n1")
                emit("alpha", "policy_updated", signer="stranger")
                emit("alpha", "policy_updated", signer="nobody")
                emit("alpha", "policy_updated", nonce="")
                emit("alpha", "policy_updated", issued_at="2020-01-01T00:00:00Z")
                emit("alpha", "policy_updated", issued_at="2990-01-01T00:00:00Z")
                plane.admin.emit_raw("alpha", b"garbage\x00\xff\n\ndata: {\n\n")
                emit("alpha", "policy_updated", size=sse.MAX_DATA_BYTES)
                emit("alpha", "policy_updated", size=sse.MAX_DATA_BYTES + 1)
                emit("alpha", "policy_updated")
                items = await next_items(stream, 11)
            assert isinstance(items.pop(9), sse.Oversized)
            assert [judge(checks, item) for item in items] == [
                Outcome.VERIFIED, Outcome.REPLAYED, Outcome.BAD_SIGNATURE, Outcome.UNSIGNED, Outcome.NO_NONCE,
                Outcome.STALE, Outcome.FUTURE, Outcome.MALFORMED, Outcome.VERIFIED, Outcome.VERIFIED,
            ]  # fmt: skip

    run(test)


def test_stream_ends_when_told_and_when_the_node_leaves() -> None:
    async def test(plane: LabControlPlane) -> None:
        async with Agent(plane, "alpha") as alpha:
            await alpha.register()
            for end in (plane.admin.end_stream, plane.admin.remove):
                async with alpha.events() as stream, asyncio.timeout(10):
                    end("alpha")
                    assert b"".join([chunk async for chunk in stream]) == b": hello\n\n"

    run(test)


# --- faults ----------------------------------------------------------------------------------------------------------


async def raw_exchange(agent: Agent, endpoint: Endpoint) -> bytes:
    """All bytes of the answer, until the other side closes; ConnectionResetError when it resets."""
    request = agent.request(endpoint)
    reader, writer = await asyncio.open_connection(request.url.host, request.url.port)
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path), b"Connection: close"]
    lines += [b"%s: %s" % pair for pair in request.headers.raw if pair[0].lower() != b"connection"]
    writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()


def parted(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    pairs = (line.split(": ", 1) for line in lines)
    return int(status.split()[1]), {name.lower(): value for name, value in pairs}, body


def fault_test(fault: Fault, endpoint: Endpoint, check: Callable[[int, dict[str, str], bytes, bytes], None]) -> None:
    async def test(plane: LabControlPlane) -> None:
        async with two_nodes(plane) as (alpha, _beta):
            honest = (await alpha.call(endpoints.STATE)).content
            plane.admin.inject(fault.model_copy(update={"endpoint": endpoint.name, "node_id": "alpha"}))
            check(*parted(await raw_exchange(alpha, endpoint)), honest)
            # spent: the next answer is whole, and the node beside it never saw it
            assert plane.admin.pending_faults == []
            assert (await alpha.call(endpoints.STATE)).status_code == 200

    run(test)


def test_status_fault_has_its_headers_and_body() -> None:
    def check(status: int, headers: dict[str, str], body: bytes, _honest: bytes) -> None:
        assert (status, headers["retry-after"], body) == (429, "7", b"slow down")

    fault = Fault(effect=Effect.STATUS, status=429, headers={"Retry-After": "7"}, body="slow down")
    fault_test(fault, endpoints.STATE, check)


@pytest.mark.parametrize("text", ["{}", "[]", ""])
def test_body_fault_is_exactly_those_bytes(text: str) -> None:
    def check(status: int, _headers: dict[str, str], body: bytes, _honest: bytes) -> None:
        assert (status, body) == (200, text.encode())

    fault_test(Fault(effect=Effect.BODY, body=text), endpoints.STATE, check)


def test_truncated_body_breaks_off_inside_the_json() -> None:
    def check(status: int, headers: dict[str, str], body: bytes, honest: bytes) -> None:
        assert (status, int(headers["content-length"])) == (200, len(body))
        assert honest.startswith(body)
        assert 0 < len(body) < len(honest)

    fault_test(Fault(effect=Effect.TRUNCATE), endpoints.STATE, check)


def test_cut_connection_ends_before_its_content_length() -> None:
    def check(status: int, headers: dict[str, str], body: bytes, honest: bytes) -> None:
        assert (status, int(headers["content-length"])) == (200, len(honest))
        assert honest.startswith(body)
        assert 0 < len(body) < len(honest)

    fault_test(Fault(effect=Effect.CUT), endpoints.STATE, check)


def test_end_fault_leaves_the_body_empty() -> None:
    def check(status: int, headers: dict[str, str], body: bytes, _honest: bytes) -> None:
        assert (status, headers["content-length"], body) == (200, "0", b"")

    fault_test(Fault(effect=Effect.END), endpoints.STATE, check)


def test_oversized_answer_is_right_but_for_its_size() -> None:
    def check(status: int, headers: dict[str, str], body: bytes, honest: bytes) -> None:
        assert (status, int(headers["content-length"]), len(body)) == (200, RESPONSE_LIMIT + 1, RESPONSE_LIMIT + 1)
        assert body.rstrip() == honest

    fault_test(Fault(effect=Effect.OVERSIZED), endpoints.STATE, check)


def test_gzip_bomb_is_small_on_the_wire() -> None:
    def check(status: int, headers: dict[str, str], body: bytes, honest: bytes) -> None:
        assert (status, headers["content-encoding"]) == (200, "gzip")
        assert len(body) < RESPONSE_LIMIT / 100
        assert zlib.decompressobj(wbits=31).decompress(body, 2 * RESPONSE_LIMIT).startswith(honest)
        assert len(gzip.decompress(body)) == 3 * RESPONSE_LIMIT

    fault_test(Fault(effect=Effect.GZIP_BOMB, size=3 * RESPONSE_LIMIT), endpoints.STATE, check)


def test_closed_stream_and_cut_stream_end_differently() -> None:
    def closed(status: int, _headers: dict[str, str], body: bytes, _honest: bytes) -> None:
        assert (status, body) == (200, b"0\r\n\r\n")

    def cut(status: int, _headers: dict[str, str], body: bytes, _honest: bytes) -> None:
        assert status == 200
        assert b": hello" in body
        assert not body.endswith(b"0\r\n\r\n")

    fault_test(Fault(effect=Effect.END), endpoints.EVENTS, closed)
    fault_test(Fault(effect=Effect.CUT), endpoints.EVENTS, cut)


@pytest.mark.parametrize("endpoint", [endpoints.STATE, endpoints.EVENTS])
def test_disconnect_resets_without_an_answer(endpoint: Endpoint) -> None:
    async def test(plane: LabControlPlane) -> None:
        async with Agent(plane, "alpha") as alpha:
            await alpha.register()
            plane.admin.inject(Fault(endpoint=endpoint.name, effect=Effect.DISCONNECT))
            with pytest.raises(ConnectionResetError):
                await raw_exchange(alpha, endpoint)
            assert plane.admin.arrived(endpoint.name)[-1].status is None

    run(test)


def test_answer_that_is_lost_was_still_acted_upon() -> None:
    async def test(plane: LabControlPlane) -> None:
        async with Agent(plane, "alpha") as alpha:
            await alpha.register()
            new = str(PrivateKey.generate().public())
            plane.admin.inject(Fault(endpoint="keys/rotate", effect=Effect.DISCONNECT))
            body = {"node_id": alpha.node_id, "new_public_key": new}
            with pytest.raises(httpx.TransportError):
                await alpha.call(endpoints.ROTATE_KEYS, body)
            assert plane.admin.node("alpha").public_key == new
            assert (await alpha.call(endpoints.ROTATE_KEYS, body)).status_code == 200

    run(test)


def test_delayed_answer_was_made_before_the_delay() -> None:
    async def test(plane: LabControlPlane) -> None:
        async with Agent(plane, "alpha") as alpha:
            await alpha.register()
            plane.admin.inject(Fault(endpoint="state", delay_seconds=0.3))
            pull = asyncio.create_task(alpha.call(endpoints.STATE))
            await plane.admin.wait_for("state")
            plane.admin.patch_state("alpha", {"metadata": {"a": "b"}})
            started = time.monotonic()
            assert (await pull).json()["metadata"] == {}
            assert time.monotonic() - started > 0.2

    run(test)


def test_count_endpoint_and_node_choose_what_a_fault_meets() -> None:
    async def test(plane: LabControlPlane) -> None:
        async with two_nodes(plane) as (alpha, beta):
            plane.admin.inject(Fault(endpoint="state", node_id="beta", count=2, effect=Effect.STATUS))
            plane.admin.inject(Fault(endpoint="state", count=None, effect=Effect.STATUS, status=503))
            got = [(await agent.call(endpoints.STATE)).status_code for agent in (beta, alpha, beta, beta, alpha)]
            assert got == [500, 503, 500, 503, 503]
            assert (await alpha.call(endpoints.PING)).status_code == 204
            plane.admin.clear_faults()
            assert (await alpha.call(endpoints.STATE)).status_code == 200

    run(test)


def test_control_plane_that_is_gone_refuses_connections_and_comes_back_on_its_port() -> None:
    async def test(plane: LabControlPlane) -> None:
        async with Agent(plane, "alpha") as alpha:
            await alpha.register()
            url = plane.url
            plane.admin.inject(Fault(endpoint="state", delay_seconds=600))
            pull = asyncio.create_task(alpha.call(endpoints.STATE))
            await plane.admin.wait_for("state")
            async with alpha.events() as stream:
                async with asyncio.timeout(5):
                    await plane.stop()
                with pytest.raises(httpx.TransportError):
                    [chunk async for chunk in stream]
            with pytest.raises(httpx.TransportError):
                await pull
            with pytest.raises(httpx.ConnectError):
                await alpha.call(endpoints.STATE)
            await plane.start()
            assert plane.url == url
            assert (await alpha.call(endpoints.STATE)).status_code == 200

    run(test)


def test_port_of_a_control_plane_that_is_gone_is_given_to_nobody() -> None:
    async def test(plane: LabControlPlane) -> None:
        await plane.stop()
        with socket.socket() as another, pytest.raises(OSError, match="in use"):
            another.bind(("127.0.0.1", int(plane.url.rpartition(":")[2])))

    run(test)


def test_revoked_key_is_refused_and_its_stream_ends() -> None:
    async def test(plane: LabControlPlane) -> None:
        async with Agent(plane, "alpha") as alpha:
            await alpha.register()
            async with alpha.events() as stream, asyncio.timeout(10):
                plane.admin.revoke(alpha.node_id)
                assert [chunk async for chunk in stream]
            assert (await alpha.call(endpoints.STATE)).status_code == 401
            plane.admin.restore(alpha.node_id)
            assert (await alpha.call(endpoints.STATE)).status_code == 200

    run(test)


# --- waiting, TLS, starting ------------------------------------------------------------------------------------------


def test_waiting_ends_with_the_arrival_or_says_what_came_instead() -> None:
    async def test(plane: LabControlPlane) -> None:
        async with Agent(plane, "alpha") as alpha:
            await alpha.register()
            waiting = asyncio.create_task(plane.admin.wait_for("heartbeat", "alpha", count=2))
            for status in ("healthy", "degraded"):
                await alpha.call(endpoints.HEARTBEAT, filled(HEARTBEAT | {"status": status}, alpha))
            assert [arrival.body["status"] for arrival in await waiting] == ["healthy", "degraded"]
            with pytest.raises(TimeoutError, match=r"1 of 2 requests to heartbeat .* \['register:201'"):
                await plane.admin.wait_for(
                    "heartbeat", where=lambda a: a.body["status"] == "degraded", count=2, timeout=0
                )

    run(test)


def test_https_is_trusted_through_the_authority_only(tmp_path: Path) -> None:
    async def test(plane: LabControlPlane) -> None:
        assert plane.tls is not None
        assert plane.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=plane.tls.ca_file)
        async with Agent(plane, "alpha", trusting) as alpha:
            await alpha.register()
            plane.admin.inject(Fault(endpoint="state", effect=Effect.CUT))
            with pytest.raises(httpx.RemoteProtocolError):
                await alpha.call(endpoints.STATE)
            plane.admin.inject(Fault(endpoint="state", effect=Effect.DISCONNECT))
            with pytest.raises(httpx.TransportError):
                await alpha.call(endpoints.STATE)
            async with alpha.events():
                await plane.stop()
        async with Agent(plane, "beta", ssl.create_default_context()) as beta:
            await plane.start()
            with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
                await beta.call(endpoints.PING)

    run(test, tls_directory=tmp_path / "tls")


def test_authority_survives_a_restart(tmp_path: Path) -> None:
    first = LabControlPlane(tls_directory=tmp_path)
    assert first.tls is not None
    authority = first.tls.ca_file.read_bytes()
    certificate = first.tls.certificate_file.read_bytes()
    LabControlPlane(tls_directory=tmp_path, host="127.0.0.2")
    assert first.tls.ca_file.read_bytes() == authority
    assert first.tls.certificate_file.read_bytes() != certificate
    assert {path.name: oct(path.stat().st_mode)[-3:] for path in tmp_path.iterdir()} == {
        "ca.pem": "644", "ca.key": "600", "server.pem": "600", "server.key": "600"
    }  # fmt: skip


async def test_state_file_brings_nodes_and_keys_back(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    async with LabControlPlane(state_file=path) as plane, Agent(plane, "alpha") as alpha:
        await alpha.register()
        plane.admin.put_secret("alpha", "db", b"s3cret")
    assert oct(path.stat().st_mode)[-3:] == "600"
    async with LabControlPlane(state_file=path) as plane:
        alpha.plane = plane
        async with httpx.AsyncClient() as alpha.http:
            state = (await alpha.call(endpoints.STATE)).json()
        assert state["secret_refs"] == [{"key": "db", "version": 1}]
        assert state["signing_keys"]["current"] == alpha.identity["signing_public_key"]


def test_port_in_use_is_one_sentence() -> None:
    async def test(plane: LabControlPlane) -> None:
        port = int(plane.url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use; stop"):
            async with LabControlPlane(port=port):
                pass

    run(test)
