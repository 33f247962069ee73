"""The client over real sockets: what it sends, and what it makes of every answer."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from email.utils import formatdate

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from plexd import __version__, errors
from plexd.control import exchange
from plexd.control.body import MAX_ANSWER_BYTES
from plexd.wire import endpoints, models
from plexd.wire.endpoints import EXTENSIONS, AnswerBody, Endpoint
from plexd.wire.writing import dump
from tests.control.rawserver import NODE_KEY, Client, Cut, RawServer, Received, answer, client_of, run_against

TOKEN = "boot strap/token"
HEARTBEAT = models.HeartbeatRequest(
    node_id="n_7f3a", timestamp="2026-03-01T12:00:00Z", status="healthy", uptime="0s", binary_checksum=""
)
REGISTRATION = models.RegisterRequest(token=SecretStr(TOKEN), public_key="k", hostname="h")
LOG = models.LogEntry(
    timestamp="2026-03-01T12:00:00Z", source="s", unit="u", message="m", severity="info", hostname="h"
)
REGISTERED = json.dumps({"node_id": "n", "mesh_ip": "10.0.0.1", "node_secret_key": NODE_KEY}).encode()


def drift_of(size: int) -> models.DriftReport:
    """A report whose JSON has exactly `size` bytes."""

    def report(detail: str) -> models.DriftReport:
        correction = models.DriftCorrection(type="peer_added", detail=detail)
        return models.DriftReport(timestamp="2026-03-01T12:00:00Z", corrections=(correction,))

    return report("x" * (size - len(dump(report("")))))


# what is sent


def parameters_of(endpoint: Endpoint) -> dict[str, str]:
    names = [part[1:-1] for part in endpoint.template.split("/") if part.startswith("{") and part != "{node_id}"]
    return {name: f"{name}/1" for name in names}


@pytest.mark.parametrize(
    "endpoint",
    [
        *(
            e
            for e in endpoints.ENDPOINTS
            if e.answer in {AnswerBody.NOTHING, AnswerBody.JSON} and e is not endpoints.REGISTER
        ),
        *EXTENSIONS,
    ],
    ids=lambda endpoint: endpoint.name,
)
def test_every_call_goes_to_its_path_with_the_node_key(endpoint: Endpoint) -> None:
    async def test(client: Client, server: RawServer) -> None:
        await client.plane.call(endpoint, None, retry_for=None, **parameters_of(endpoint))
        (request,) = server.received
        expected = endpoint.template.replace("{node_id}", "n_7f3a")
        for name in parameters_of(endpoint):
            expected = expected.replace(f"{{{name}}}", f"{name}%2F1")
        assert (request.method, request.target) == (endpoint.method, expected)
        assert request.bearer == NODE_KEY
        assert request.headers["user-agent"] == f"plexd/{__version__}"
        assert request.headers["accept"] == "application/json"
        assert request.headers["accept-encoding"] == "gzip"
        assert "content-type" not in request.headers
        assert request.body == b""
        allowed = {"host", "authorization", "user-agent", "accept", "accept-encoding", "content-length"}
        assert set(request.headers) <= allowed

    run_against(answer(200, b"{}"), test)


def test_bootstrap_token_goes_to_registration_only() -> None:
    async def test(client: Client, server: RawServer) -> None:
        await client.plane.register(REGISTRATION, retry_for=0)
        await client.plane.state()
        first, second = server.received
        assert (first.target, first.bearer, first.json()["token"]) == ("/v1/register", TOKEN, TOKEN)
        assert second.bearer == NODE_KEY
        assert TOKEN not in str(second)

    run_against(answer(201, REGISTERED), test)


def test_refused_token_says_nothing_about_the_node_key() -> None:
    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(errors.Unauthenticated):
            await client.plane.register(REGISTRATION, retry_for=0)
        assert client.refused == []

    run_against(answer(401), test)


@pytest.mark.parametrize("token", ["", " x", "x ", "a\r\nX: y", "tök", "x" * 513, "a\tb"])
def test_token_that_fits_no_header_is_not_sent(token: str) -> None:
    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(errors.Unauthenticated) as caught:
            await client.plane.register(REGISTRATION.model_copy(update={"token": SecretStr(token)}), retry_for=0)
        assert server.received == []
        assert not token or token not in str(caught.value)

    run_against(answer(201, REGISTERED), test)


@pytest.mark.parametrize("key", ["", "a b", "a\nb", "ü", "x" * 513])
def test_node_key_that_fits_no_header_is_not_sent(key: str) -> None:
    async def test(client: Client, server: RawServer) -> None:
        client.key = SecretStr(key)
        with pytest.raises(errors.Unauthenticated):
            await client.plane.state()
        with pytest.raises(errors.Unauthenticated):
            async with client.plane.events(None):
                pass
        assert server.received == []
        assert client.refused == []

    run_against(answer(200, b"{}"), test)


@pytest.mark.parametrize(
    ("key", "segment"),
    [("a/b", "a%2Fb"), ("ü", "%C3%BC"), ("a b", "a%20b"), ("%2e", "%252e"), ("a?b#c", "a%3Fb%23c"), ("~-._", "~-._")],
)
async def test_path_parameters_stay_one_segment(key: str, segment: str) -> None:
    async def test(client: Client, server: RawServer) -> None:
        body = {"key": key, "ciphertext": "", "nonce": "", "version": 1}
        server.handler = answer(200, json.dumps(body).encode())
        assert (await client.plane.secret(key)).key == key
        assert server.received[0].target == f"/base/v1/nodes/n_7f3a/secrets/{segment}"

    async with RawServer(b"").running() as server, client_of(server, "/base") as client:
        await test(client, server)


@pytest.mark.parametrize("key", ["", ".", "..", "a\nb", "x" * 257])
def test_impossible_path_parameters_are_refused_here(key: str) -> None:
    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(errors.WireError):
            await client.plane.secret(key)
        assert server.received == []

    run_against(answer(200, b"{}"), test)


@pytest.mark.parametrize(("size", "packed"), [(1024, False), (1025, True)])
def test_requests_above_1024_bytes_are_compressed(size: int, packed: bool) -> None:
    async def test(client: Client, server: RawServer) -> None:
        report = drift_of(size)
        await client.plane.drift(report)
        (request,) = server.received
        assert request.headers["content-type"] == "application/json"
        assert (request.headers.get("content-encoding") == "gzip") is packed
        assert (gzip.decompress(request.body) if packed else request.body) == dump(report)

    run_against(answer(204), test)


@pytest.mark.parametrize("endpoint", [endpoints.METRICS, endpoints.LOGS, endpoints.AUDIT], ids=lambda e: e.name)
def test_telemetry_is_always_compressed(endpoint: Endpoint) -> None:
    async def test(client: Client, server: RawServer) -> None:
        await client.plane.call(endpoint, [LOG])
        (request,) = server.received
        assert request.headers["content-encoding"] == "gzip"
        assert request.json() == [json.loads(dump(LOG))]

    run_against(answer(202), test)


def test_batch_of_telemetry_goes_out_as_it_is_and_its_size_on_the_wire_is_told() -> None:
    async def test(client: Client, server: RawServer) -> None:
        sent = await client.plane.deliver(endpoints.LOGS, b'[{"message":"\xc3\xa9"}]')
        (request,) = server.received
        assert request.json() == [{"message": "é"}]
        assert sent == len(request.body)

    run_against(answer(202), test)


@pytest.mark.parametrize("status", [500, 429, 408])
def test_batch_of_telemetry_is_tried_once(status: int) -> None:
    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(errors.Transient):
            await client.plane.deliver(endpoints.LOGS, b"[{}]")
        assert len(server.received) == 1

    run_against(answer(status), test)


def test_refused_compression_is_repeated_once_without() -> None:
    async def handler(request: Received, _: asyncio.StreamWriter) -> bytes:
        return answer(415 if "content-encoding" in request.headers else 204)

    async def test(client: Client, server: RawServer) -> None:
        await client.plane.drift(drift_of(2000))
        packed, plain = server.received
        assert packed.json() == plain.json()

    run_against(handler, test)


@pytest.mark.parametrize(("size", "requests"), [(200, 1), (2000, 2)])
def test_a_second_415_is_a_rejection(size: int, requests: int) -> None:
    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(errors.Rejected):
            await client.plane.drift(drift_of(size))
        assert len(server.received) == requests

    run_against(answer(415), test)


def test_credential_swap_takes_effect_at_the_next_request() -> None:
    """Requests under way keep the key they began with, those that wait for their turn have the new one."""
    release = asyncio.Event()

    async def handler(request: Received, _: asyncio.StreamWriter) -> bytes:
        await release.wait()
        return answer(401 if request.bearer == NODE_KEY else 200, b"{}")

    async def test(client: Client, server: RawServer) -> None:
        tasks = [asyncio.create_task(client.plane.state()) for _ in range(10)]
        await server.until_received(7)
        client.key, client.node_id = SecretStr("new-key"), "n_new"
        release.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(result, errors.Unauthenticated) for result in results) == 7
        assert [request.bearer for request in server.received] == [NODE_KEY] * 7 + ["new-key"] * 3
        assert [request.target.split("/")[3] for request in server.received[7:]] == ["n_new"] * 3
        assert [key.get_secret_value() for key in client.refused] == [NODE_KEY] * 7

    run_against(handler, test)


def test_eight_requests_at_once_and_the_heartbeat_never_waits() -> None:
    release = asyncio.Event()
    running = most = 0

    async def handler(request: Received, _: asyncio.StreamWriter) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if not request.target.endswith("/heartbeat"):
            await release.wait()
        running -= 1
        return answer(200, b"{}")

    async def test(client: Client, server: RawServer) -> None:
        tasks = [asyncio.create_task(client.plane.state()) for _ in range(20)]
        await server.until_received(7)
        for _ in range(3):
            async with asyncio.timeout(5):
                await client.plane.heartbeat(HEARTBEAT, limit=5.0)
        assert len(server.received) == 10
        release.set()
        await asyncio.gather(*tasks)
        assert most <= 8
        assert server.connections <= 8

    run_against(handler, test)


def test_connections_are_kept() -> None:
    async def test(client: Client, server: RawServer) -> None:
        for _ in range(3):
            await client.plane.state()
            await client.plane.drift(drift_of(200))
            with pytest.raises(errors.Forbidden):
                await client.plane.secret("k")
        assert server.connections == 1

    async def handler(request: Received, _: asyncio.StreamWriter) -> bytes:
        return answer(403, b"no") if "/secrets/" in request.target else answer(200, b"{}")

    run_against(handler, test)


def test_cancelled_requests_leave_room_for_others() -> None:
    async def handler(request: Received, _: asyncio.StreamWriter) -> bytes:
        if request.target.endswith("/drift"):
            await asyncio.Event().wait()
        return answer(200, b"{}")

    async def test(client: Client, server: RawServer) -> None:
        for _ in range(3):
            tasks = [asyncio.create_task(client.plane.drift(drift_of(200))) for _ in range(7)]
            await server.until_received(len(server.received) + 7)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(5):
            await client.plane.state()

    run_against(handler, test)


# what is made of answers


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (302, errors.Misconfigured),
        (400, errors.Rejected),
        (401, errors.Unauthenticated),
        (403, errors.Forbidden),
        (404, errors.NotFound),
        (408, errors.Transient),
        (409, errors.Conflict),
        (413, errors.TooLarge),
        (422, errors.Rejected),
        (429, errors.RateLimited),
        (500, errors.Transient),
        (501, errors.NotFound),
        (503, errors.Transient),
    ],
)
def test_refusals_carry_status_and_text(status: int, kind: type[errors.ControlError]) -> None:
    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(kind) as caught:
            await client.plane.state()
        assert type(caught.value) is kind
        assert caught.value.status == status
        assert caught.value.body == "[1mnot today"
        assert str(status) in str(caught.value)
        assert str(caught.value).endswith(": [1mnot today")
        assert len(client.refused) == (status == 401)

    run_against(answer(status, b"\x1b[1mnot today\n"), test)


@pytest.mark.parametrize(
    ("body", "headers", "text"),
    [
        (gzip.compress(b"packed"), {"Content-Encoding": "gzip"}, "packed"),
        (b"x" * 100_000, {}, "x" * 4096),
        (gzip.compress(b"y" * 100_000), {"Content-Encoding": "gzip"}, "y" * 4096),
        (b"?", {"Content-Encoding": "br"}, ""),
        (b"not gzip", {"Content-Encoding": "gzip"}, ""),
        (b"cut", {"Content-Length": "10"}, "cut"),
        (f"bad key {NODE_KEY}".encode(), {}, "bad key [redacted]"),
    ],
)
def test_whatever_the_text_the_status_decides(body: bytes, headers: dict[str, str], text: str) -> None:
    async def handler(_: Received, writer: asyncio.StreamWriter) -> bytes:
        writer.write(answer(403, body, headers))
        await writer.drain()
        raise Cut

    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(errors.Forbidden) as caught:
            await client.plane.state()
        assert caught.value.body == text

    run_against(handler, test)


def test_stalled_error_text_does_not_hide_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "LEFTOVER_SECONDS", 0.05)

    async def handler(_: Received, writer: asyncio.StreamWriter) -> bytes:
        writer.write(answer(401, b"", {"Content-Length": "10"}))
        await asyncio.Event().wait()
        return b""

    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(errors.Unauthenticated):
            await client.plane.state()

    run_against(handler, test)


@pytest.mark.parametrize(
    ("status", "value", "seconds"),
    [(429, "7", 7.0), (503, "7", 7.0), (503, "soon", None), (429, "99999", 3600.0), (500, "7", None), (302, "7", None)],
)
def test_retry_after_counts_on_429_and_503_only(status: int, value: str, seconds: float | None) -> None:
    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(errors.Transient) as caught:
            await client.plane.state()
        assert caught.value.retry_after == seconds

    run_against(answer(status, b"", {"Retry-After": value}), test)


def test_retry_after_as_a_date_is_measured_by_the_servers_clock() -> None:
    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(errors.RateLimited) as caught:
            await client.plane.state()
        assert caught.value.retry_after == 90.0

    dates = {"Date": "Sun, 01 Mar 2026 12:00:00 GMT", "Retry-After": "Sun, 01 Mar 2026 12:01:30 GMT"}
    run_against(answer(429, b"", dates), test)


def test_retry_after_of_a_heartbeat_is_clamped_to_five_minutes() -> None:
    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(errors.Transient) as caught:
            await client.plane.heartbeat(HEARTBEAT, limit=5.0)
        assert caught.value.retry_after == 300.0

    run_against(answer(503, b"", {"Retry-After": "3000"}), test)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_refused_and_nothing_is_sent_there(status: int) -> None:
    async with RawServer(answer(200, b"{}")).running() as other:
        location = {"Location": f"http://127.0.0.2:{other.port}/v1/register"}
        async with RawServer(answer(status, b"", location)).running() as server, client_of(server) as client:
            with capture_logs() as logs:
                for _ in range(2):
                    with pytest.raises(errors.Misconfigured):
                        await client.plane.state()
                with pytest.raises(errors.Misconfigured):
                    await client.plane.register(REGISTRATION, retry_for=0)
            assert other.connections == 0
            assert [log["target"] for log in logs if log["log_level"] == "error"] == ["127.0.0.2"]


@pytest.mark.parametrize("location", ["", "http://[", "//\x7f", "http://exa mple/", "/relative", "\xff"])
def test_odd_redirect_targets_are_still_redirects(location: str) -> None:
    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(errors.Transient):
            await client.plane.state()

    run_against(answer(302, b"", {"Location": location}), test)


def test_cookies_are_not_kept() -> None:
    async def test(client: Client, server: RawServer) -> None:
        await client.plane.state()
        await client.plane.state()
        assert "cookie" not in server.received[1].headers

    run_against(answer(200, b"{}", {"Set-Cookie": "a=b"}), test)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("excess", [0, 1])
def test_answers_have_ten_mebibytes_at_most(packed: bool, excess: int) -> None:
    start, end = b'{"metadata":{"k":"', b'"}}'
    body = start + b"x" * (MAX_ANSWER_BYTES + excess - len(start) - len(end)) + end
    sent = gzip.compress(body, 1) if packed else body

    async def test(client: Client, server: RawServer) -> None:
        if excess:
            with pytest.raises(errors.Transient, match="larger than"):
                await client.plane.state()
        else:
            state, _ = await client.plane.state()
            assert len(state.metadata["k"]) == MAX_ANSWER_BYTES - len(start) - len(end)

    run_against(answer(200, sent, {"Content-Encoding": "gzip"} if packed else {}), test)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b'{"peers":[]', {}),
        (b"not json", {}),
        (b" ", {}),
        (b"\xef\xbb\xbf{}", {}),
        (b'{"a":NaN}', {}),
        (b"[" * 100_000, {}),
        (b"", {}),
        (b"", {"Content-Encoding": "gzip"}),
        (b"{}", {"Content-Encoding": "br"}),
        (b"{}", {"Content-Encoding": "gzip"}),
        (gzip.compress(b"{}")[:-3], {"Content-Encoding": "gzip"}),
        (b"{}", {"Content-Length": "100"}),
        (b"", {"Transfer-Encoding": "chunked", "Content-Length": "0"}),
    ],
)
def test_damaged_answers_are_passing_failures(body: bytes, headers: dict[str, str]) -> None:
    async def handler(_: Received, writer: asyncio.StreamWriter) -> bytes:
        writer.write(answer(200, body, headers))
        await writer.drain()
        raise Cut

    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(errors.Transient):
            await client.plane.state()

    run_against(handler, test)


@pytest.mark.parametrize("body", [b"[]", b"1", b'"x"', b"null", b'{"peers":{}}', b'{"peers":3}'])
def test_json_of_the_wrong_shape_is_a_wire_error(body: bytes) -> None:
    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(errors.WireError):
            await client.plane.state()

    run_against(answer(200, body), test)


def test_left_out_elements_come_with_the_answer() -> None:
    async def test(client: Client, server: RawServer) -> None:
        state, skipped = await client.plane.state()
        assert [peer.id for peer in state.peers] == ["a"]
        assert [(item.path, item.id) for item in skipped] == [("peers[1]", "b")]

    run_against(answer(200, b'{"peers":[{"id":"a"},{"id":"b","endpoint":7}]}'), test)


@pytest.mark.parametrize(
    "raw", [b"garbage\r\n\r\n", b"HTTP/1.1 200\r\n", b"", b"HTTP/1.1 200 OK\r\nBad Header\r\n\r\n"]
)
def test_what_is_no_http_is_a_passing_failure(raw: bytes) -> None:
    async def handler(_: Received, writer: asyncio.StreamWriter) -> bytes:
        writer.write(raw)
        await writer.drain()
        raise Cut

    async def test(client: Client, server: RawServer) -> None:
        with pytest.raises(errors.Transient):
            await client.plane.state()

    run_against(handler, test)


def test_empty_body_is_an_empty_object_where_none_is_needed() -> None:
    async def test(client: Client, server: RawServer) -> None:
        hints = await client.plane.heartbeat(HEARTBEAT, limit=5.0)
        assert not hints.reconcile
        with pytest.raises(errors.Transient, match="no body"):
            await client.plane.register(REGISTRATION, retry_for=0)

    run_against(answer(204), test)


@pytest.mark.parametrize(
    ("body", "headers"),
    [(b"<html>", {}), (b"cut", {"Content-Length": "10"}), (b"?", {"Content-Encoding": "br"}), (b"x" * 200_000, {})],
)
def test_body_that_nobody_needs_is_ignored(body: bytes, headers: dict[str, str]) -> None:
    async def handler(_: Received, writer: asyncio.StreamWriter) -> bytes:
        writer.write(answer(202, body, headers))
        await writer.drain()
        raise Cut

    async def test(client: Client, server: RawServer) -> None:
        await client.plane.drift(drift_of(200))

    run_against(handler, test)


# limits


def test_slow_answer_ends_at_the_limit() -> None:
    async def handler(_: Received, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while True:  # every byte comes soon enough for a limit on single reads
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)

    async def test(client: Client, server: RawServer) -> None:
        started = time.monotonic()
        with pytest.raises(errors.Transient, match="within the time limit"):
            await client.plane.heartbeat(HEARTBEAT, limit=0.3)
        assert time.monotonic() - started < 3

    run_against(handler, test)


async def test_connection_without_tls_ends_after_the_time_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "CONNECT_SECONDS", 0.2)
    closed = asyncio.Event()

    async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        closed.set()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(never_answer, "127.0.0.1", 0) as silent:
        client = Client(f"https://127.0.0.1:{silent.sockets[0].getsockname()[1]}")
        with pytest.raises(errors.Transient, match="no connection within"):
            await client.plane.state()
        async with asyncio.timeout(5):
            await closed.wait()
        await client.plane.close()


def test_slow_answer_may_take_longer_than_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "CONNECT_SECONDS", 0.2)

    async def handler(_: Received, writer: asyncio.StreamWriter) -> bytes:
        await asyncio.sleep(0.5)
        return answer(200, b"{}")

    async def test(client: Client, server: RawServer) -> None:
        await client.plane.state()

    run_against(handler, test)


async def test_refused_connection_names_the_reason() -> None:
    client = Client("http://127.0.0.1:1")
    with pytest.raises(errors.Transient, match=r"refused|Connect call failed") as caught:
        await client.plane.state()
    assert caught.value.status is None
    await client.plane.close()


async def test_unknown_host_is_a_passing_failure() -> None:
    for host in ("no-such-host.invalid", "x" * 64 + ".invalid"):
        client = Client(f"https://{host}")
        with pytest.raises(errors.Transient):
            await client.plane.state()
        await client.plane.close()


# what is noticed by the way


def test_dates_of_answers_give_the_clock_offset() -> None:
    async def handler(request: Received, _: asyncio.StreamWriter) -> bytes:
        status = 500 if request.target.endswith("/state") else 200
        return answer(status, b"{}", {"Date": formatdate(time.time() + 73, usegmt=True)})

    async def test(client: Client, server: RawServer) -> None:
        await client.plane.heartbeat(HEARTBEAT, limit=5.0)
        with pytest.raises(errors.Transient):
            await client.plane.state()
        assert client.offsets == [pytest.approx(73, abs=2), pytest.approx(73, abs=2)]

    run_against(handler, test)


def test_odd_dates_are_no_news() -> None:
    async def test(client: Client, server: RawServer) -> None:
        await client.plane.state()
        assert client.offsets == []

    run_against(answer(200, b"{}", {"Date": "yesterday"}), test)


def test_debug_line_tells_the_traffic_and_no_secret() -> None:
    async def test(client: Client, server: RawServer) -> None:
        with capture_logs() as logs:
            await client.plane.register(REGISTRATION, retry_for=0)
            await client.plane.state()
        register, state = (log for log in logs if log["event"] == "request finished")
        assert (register["method"], register["path"], register["status"]) == ("POST", "/v1/register", 201)
        assert register["sent_bytes"] == len(dump(REGISTRATION))
        assert state["received_bytes"] == len(REGISTERED)
        assert state["duration_seconds"] >= 0
        text = str(logs)
        assert TOKEN not in text
        assert NODE_KEY not in text

    run_against(answer(201, REGISTERED), test)
