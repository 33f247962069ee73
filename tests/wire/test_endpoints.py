from __future__ import annotations

import pytest

from plexd.errors import WireError
from plexd.wire.endpoints import ENDPOINTS, EXTENSIONS, SECRET, AnswerBody, Credential
from plexd.wire.values import decode_base64, is_bearer, parse_checksum, parse_mesh_ip, path_segment

N = "/v1/nodes/n_1"


def test_the_seventeen_calls_are_those_of_the_contract() -> None:
    parameters = {
        "node_id": "n_1",
        "execution_id": "e-1",
        "key": "db",
        "version": "1.2.3",
        "os": "linux",
        "arch": "amd64",
    }
    calls = [
        (e.method, e.path(**parameters), e.request and e.request.__name__, e.response and e.response.__name__)
        for e in ENDPOINTS
    ]
    assert calls == [
        ("POST", "/v1/register", "RegisterRequest", "RegisterResponse"),
        ("GET", f"{N}/events", None, None),
        ("POST", f"{N}/heartbeat", "HeartbeatRequest", "HeartbeatResponse"),
        ("POST", f"{N}/deregister", None, None),
        ("POST", "/v1/keys/rotate", "KeyRotateRequest", "KeyRotateResponse"),
        ("PUT", f"{N}/capabilities", "CapabilitiesPayload", None),
        ("PUT", f"{N}/endpoint", "EndpointReport", "EndpointResponse"),
        ("GET", f"{N}/state", None, "StateResponse"),
        ("POST", f"{N}/drift", "DriftReport", None),
        ("GET", f"{N}/secrets/db", None, "SecretResponse"),
        ("POST", f"{N}/report", "ReportSyncRequest", None),
        ("POST", f"{N}/executions/e-1/ack", "ExecutionAck", None),
        ("POST", f"{N}/executions/e-1/result", "ExecutionResult", None),
        ("POST", f"{N}/metrics", "MetricPoint", None),
        ("POST", f"{N}/logs", "LogEntry", None),
        ("POST", f"{N}/audit", "AuditEntry", None),
        ("GET", "/v1/artifacts/plexd/1.2.3/linux/amd64", None, None),
    ]


def test_extensions_are_those_of_the_contract() -> None:
    calls = [(e.method, e.path(node_id="n_1", session_id="s-1"), e.extension) for e in EXTENSIONS]
    assert calls == [
        ("GET", "/v1/ping", True),
        ("POST", f"{N}/tunnels/s-1/ready", True),
        ("POST", f"{N}/tunnels/s-1/closed", True),
        ("POST", f"{N}/integrity/violations", True),
    ]


def test_particulars_of_single_calls() -> None:
    assert {e.name for e in ENDPOINTS if e.credential is Credential.BOOTSTRAP_TOKEN} == {"register"}
    assert {e.name for e in ENDPOINTS if e.body_required} == {"register", "state", "secrets", "keys/rotate"}
    assert {e.name for e in ENDPOINTS if e.batch} == {"metrics", "logs", "audit"}
    assert {e.name for e in ENDPOINTS if e.always_gzip} == {"metrics", "logs", "audit"}
    assert {e.name: e.limit for e in ENDPOINTS if e.limit != 30.0} == {
        "events": None, "deregister": 10.0, "secrets": 10.0, "artifacts": 600.0,
    }  # fmt: skip
    assert all((e.response is not None) == (e.answer is AnswerBody.JSON) for e in (*ENDPOINTS, *EXTENSIONS))


@pytest.mark.parametrize(
    ("text", "segment"),
    [("a/b", "a%2Fb"), ("ü", "%C3%BC"), ("a b", "a%20b"), ("A-Z.a_z~9", "A-Z.a_z~9"), ("...", "..."),
     ("a%2Fb", "a%252Fb"), ("?#&+", "%3F%23%26%2B"), ("x" * 256, "x" * 256)],
)  # fmt: skip
def test_parameter_becomes_one_segment(text: str, segment: str) -> None:
    assert path_segment(text) == segment
    assert SECRET.path(node_id="n", key=text) == f"/v1/nodes/n/secrets/{segment}"


@pytest.mark.parametrize("text", ["", ".", "..", "a\nb", "\x7f", "x\0", "ü" * 129, "\ud800"])
def test_parameter_that_must_not_be_sent_is_refused(text: str) -> None:
    with pytest.raises(WireError, match=r"^key of secrets is "):
        SECRET.path(node_id="n", key=text)


@pytest.mark.parametrize(
    "text",
    ["sha256:" + "ab" * 32, "AB" * 32, "SHA256:" + "aB" * 32],
)
def test_checksum_is_read_in_every_form(text: str) -> None:
    assert parse_checksum(text) == "sha256:" + "ab" * 32


@pytest.mark.parametrize("text", ["", "sha256:", "ab" * 31, "zz" * 32, "sha512:" + "ab" * 32, "ab" * 32 + "\n"])
def test_what_is_no_checksum_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a SHA-256 checksum"):
        parse_checksum(text)


def test_mesh_address_may_carry_a_prefix_length() -> None:
    assert parse_mesh_ip("10.100.4.9/24") == parse_mesh_ip("10.100.4.9") == bytes([10, 100, 4, 9])
    assert parse_mesh_ip("fd00::9/64")[-1] == 9


@pytest.mark.parametrize("text", ["", "10.1", "010.1.1.1", "10.1.1.1/33", "10.1.1.1/", "fe80::1%eth0", "host"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an IP address"):
        parse_mesh_ip(text)


@pytest.mark.parametrize(
    "text",
    ["AA", "AA=", "AA==\n", " AA==", "AB==", "_w==", "", "AAA=", "ü"],
)
def test_only_canonical_standard_base64_of_the_right_length_is_taken(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(is|has) "):
        decode_base64(text, 1)
    assert decode_base64("AA==", 1) == b"\0"


def test_bearer_is_printable_and_at_most_512_bytes() -> None:
    assert is_bearer("x" * 512)
    assert not any(map(is_bearer, ("", "x" * 513, "a b", "a\n", "ü", "\x7f")))
