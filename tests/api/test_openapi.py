"""The node API held against the document it serves, and against what no document would allow."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import plexd
from plexd.api.openapi import OPERATIONS, describe
from plexd.api.revision import Revision
from tests.api_harness import House

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
LEAKS = ("Traceback", 'File "', str(Path(plexd.__file__).parent), "/tmp/", "object at 0x", "plexd.api")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with pytest.MonkeyPatch.context() as patch:

        async def at_once(self: Revision, since: int, seconds: float) -> bool:
            return self.number > since

        patch.setattr(Revision, "beyond", at_once)
        with House(tmp_path_factory.mktemp("house"), is_open=True) as house:
            yield house


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda part: part)
def test_what_the_document_allows_is_answered_as_it_says(house: House, method: str, path: str) -> None:
    operation = schemathesis.openapi.from_dict(describe(house.api_server.routes()))[path][method]

    @given(case=operation.as_strategy())
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    def ask(case: schemathesis.Case[Any]) -> None:
        response = case.call(base_url=f"http://127.0.0.1:{house.ports['everything']}", timeout=20)
        case.validate_response(response, checks=CHECKS)
        assert not [leak for leak in LEAKS if leak in response.text]

    ask()


def test_document_has_every_route_and_is_served(house: House) -> None:
    routes = house.api_server.routes()
    served = describe(routes)
    told = {(method.upper(), path) for path, operations in served["paths"].items() for method in operations}
    assert told == {(route.method, route.path) for route in routes if route.method != "HEAD"}
    assert set(OPERATIONS) <= told
    with socket.create_connection(("127.0.0.1", house.ports["everything"]), timeout=20) as sock:
        sock.sendall(b"GET /v1/openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        text = b"".join(iter(lambda: sock.recv(1 << 16), b"")).partition(b"\r\n\r\n")[2]
    assert json.loads(text) == json.loads(json.dumps(served))


# bytes that no document allows

TARGETS = (
    "/v1/state", "/v1/state/report/a", "/v1/state/data/%00", "/v1/state/metadata/%ff%fe", "/v1/state/secrets/..",
    "/v1/state?since=1&wait=1s", "/v1/status", "/healthz", "/v1/reconcile", "/v1/config/reload", "*", "http://x/v1/state",
    "/v1/state/report/" + "k" * 5000, "/v1/state/" + "%2e%2e/" * 200, "/v1/state?" + "a=b&" * 2000,
)  # fmt: skip
HEADERS = (
    b"If-Match: \xff\xfe", b"If-Match: " + b"9" * 8000, b"If-None-Match: " + b'"1",' * 1500, b"Content-Length: 5",
    b"Content-Length: 0", b"Content-Length: 99999999999999999999", b"Content-Length: -1", b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip", b"Expect: 100-continue", b"Content-Encoding: gzip", b"Upgrade: websocket",
    b"Connection: upgrade", b"X: \x00", b"Host: y", b"Range: bytes=0-", b"X" * 3000 + b": y",
)  # fmt: skip
BODIES = (
    b"", b"{}", b"\x00" * 100, b'{"content_type":"a/b","payload":' + b"[" * 900 + b"]" * 900 + b"}",
    b"5\r\nabcde\r\n0\r\n\r\n",
    b'{"content_type":"a/b","payload":1e999999}', b'{"content_type":"\\ud800/b","payload":"\\udfff"}',
    b"GET / HTTP/1.1\r\n\r\n",
    b'{"content_type":"a/b","payload":{"a":1,"a":2}}', b"\xef\xbb\xbf{}",
    b'{"payload":' + b"9" * 6000 + b',"content_type":"a/b"}',
)  # fmt: skip


def exchange(port: int, sent: bytes) -> bytes:
    """What the server says until it hangs up, or until it waits for more."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        heard = b""
        try:
            while chunk := sock.recv(1 << 16):
                heard += chunk
        except ConnectionResetError:
            pass
        return heard


@pytest.mark.parametrize("seed", range(300))
def test_raw_bytes_get_an_answer_without_a_fault_or_nothing(house: House, seed: int) -> None:
    chance = random.Random(seed)
    method = chance.choice(["GET", "PUT", "DELETE", "POST", "HEAD", "OPTIONS", "CONNECT", "TRACE", "get", "P\x00T"])
    headers = [b"Host: x", *chance.sample(HEADERS, chance.randrange(4))]
    body = chance.choice(BODIES)
    if chance.random() < 0.6:
        headers.append(b"Content-Length: %d" % len(body))
    head = f"{method} {chance.choice(TARGETS)} HTTP/1.{chance.choice('1111029')}".encode()
    sent = b"\r\n".join([head, *headers, b"", body])
    if chance.random() < 0.3:
        place = chance.randrange(len(sent))
        sent = sent[:place] + chance.randbytes(chance.randrange(8)) + sent[place + chance.randrange(4) :]
    heard = exchange(house.ports["everything"], sent)
    for line in heard.split(b"\r\n"):
        if line.startswith(b"HTTP/1.1 "):
            assert int(line.split()[1]) not in {500, 502}, (sent, heard)
    assert not [leak for leak in LEAKS if leak.encode() in heard], (sent, heard)


def test_slow_callers_starve_nobody(house: House) -> None:
    """Twice as many as there may be, each with half a request; somebody who asks properly is served all the while."""
    port = house.ports["everything"]
    slow = []
    for number in range(256):
        sock = socket.create_connection(("127.0.0.1", port), timeout=20)
        sock.sendall(
            (b"GET /v1/st", b"PUT /v1/state/report/a HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")[number % 2]
        )
        slow.append(sock)
        if number % 16 == 0:
            assert exchange(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert exchange(port, b"GET /v1/state HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 200")
    for sock in slow:
        sock.close()
