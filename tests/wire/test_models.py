from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from plexd.errors import WireError
from plexd.wire import models as m
from plexd.wire.endpoints import ENDPOINTS, EXTENSIONS
from plexd.wire.reading import JSONText, read, read_list
from plexd.wire.writing import dump

VECTORS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("vectors").joinpath("responses.json").read_text())
ANSWERS = sorted({vector["type"] for vector in VECTORS})
SECRET_MEMBERS = {"token", "node_secret_key", "psk", "key_pem", "cert_pem", "ciphertext", "session_token"}

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
T = "2026-03-01T12:30:15.12Z"
SUM = "sha256:" + "ab" * 32

PARAM = m.ActionParam(name="p", type="bool", required=False, description="d")
CAPABILITIES = m.CapabilitiesPayload(builtin_actions=(), hooks=())
CAPABILITIES_TEXT = '{"builtin_actions":[],"hooks":[]}'
CALLER = m.TriggeredBy(type="session", session_id="s", user_id="u", email="e")

WRITTEN: list[tuple[m.Model | Sequence[m.Model], str]] = [
    (
        m.RegisterRequest(token=SecretStr("t"), public_key=KEY, hostname="h"),
        f'{{"token":"t","public_key":"{KEY}","hostname":"h"}}',
    ),
    (
        m.RegisterRequest(
            token=SecretStr("t"), public_key=KEY, hostname="h", metadata={"os": "linux"}, capabilities=CAPABILITIES
        ),
        (
            f'{{"token":"t","public_key":"{KEY}","hostname":"h","metadata":{{"os":"linux"}},'
            f'"capabilities":{CAPABILITIES_TEXT}}}'
        ),
    ),
    (
        m.HeartbeatRequest(node_id="n", timestamp=T, status="healthy", uptime="1m30s", binary_checksum=""),
        f'{{"node_id":"n","timestamp":"{T}","status":"healthy","uptime":"1m30s","binary_checksum":""}}',
    ),
    (
        m.HeartbeatRequest(
            node_id="n",
            timestamp=T,
            status="degraded",
            uptime="0s",
            binary_checksum=SUM,
            mesh=m.MeshInfo(interface="plexd0", peer_count=0, listen_port=51820),
            nat=m.NATInfo(public_endpoint="203.0.113.9:51820", type="full_cone"),
            bridge=m.BridgeInfo(
                enabled=True,
                access_interface="eth1",
                active_routes=0,
                relay_enabled=False,
                active_relay_sessions=0,
                ingress_enabled=False,
                active_ingress_rules=0,
                site_to_site_enabled=False,
                active_site_to_site_tunnels=0,
            ),
            user_access=m.UserAccessInfo(enabled=True, interface_name="wg-a", peer_count=1, listen_port=2),
            ingress=m.IngressInfo(enabled=True, rule_count=1, connection_count=2),
            site_to_site=m.SiteToSiteInfo(enabled=True, tunnel_count=3),
        ),
        (
            f'{{"node_id":"n","timestamp":"{T}","status":"degraded","uptime":"0s","binary_checksum":"{SUM}",'
            '"mesh":{"interface":"plexd0","peer_count":0,"listen_port":51820},'
            '"nat":{"public_endpoint":"203.0.113.9:51820","type":"full_cone"},'
            '"bridge":{"enabled":true,"access_interface":"eth1","active_routes":0,"relay_enabled":false,'
            '"active_relay_sessions":0,"ingress_enabled":false,"active_ingress_rules":0,"site_to_site_enabled":false,'
            '"active_site_to_site_tunnels":0},'
            '"user_access":{"enabled":true,"interface_name":"wg-a","peer_count":1,"listen_port":2},'
            '"ingress":{"enabled":true,"rule_count":1,"connection_count":2},'
            '"site_to_site":{"enabled":true,"tunnel_count":3}}'
        ),
    ),
    (m.KeyRotateRequest(node_id="n", new_public_key=KEY), f'{{"node_id":"n","new_public_key":"{KEY}"}}'),
    (CAPABILITIES, CAPABILITIES_TEXT),
    (
        m.CapabilitiesPayload(
            binary=m.BinaryInfo(version="1", checksum=""),
            builtin_actions=(m.ActionInfo(name="a", description="", parameters=(PARAM,)),),
            hooks=(
                m.HookInfo(
                    name="h", description="", source="/x", checksum=SUM, parameters=(), timeout="2m0s", sandbox="none"
                ),
            ),
        ),
        (
            '{"binary":{"version":"1","checksum":""},"builtin_actions":[{"name":"a","description":"","parameters":'
            '[{"name":"p","type":"bool","required":false,"description":"d"}]}],"hooks":[{"name":"h","description":"",'
            f'"source":"/x","checksum":"{SUM}","parameters":[],"timeout":"2m0s","sandbox":"none"}}]}}'
        ),
    ),
    (m.EndpointReport(public_endpoint="", nat_type="unknown"), '{"public_endpoint":"","nat_type":"unknown"}'),
    (
        m.DriftReport(timestamp=T, corrections=(m.DriftCorrection(type="peer_added", detail="peer n"),)),
        f'{{"timestamp":"{T}","corrections":[{{"type":"peer_added","detail":"peer n"}}]}}',
    ),
    (m.ReportSyncRequest(entries=(), deleted=()), '{"entries":[],"deleted":[]}'),
    (
        m.ReportSyncRequest(
            entries=(
                m.ReportEntry(
                    key="k", content_type="application/json", payload=JSONText('{"a":1.0}'), version=1, updated_at=T
                ),
            ),
            deleted=("x",),
        ),
        (
            '{"entries":[{"key":"k","content_type":"application/json","payload":{"a":1.0},"version":1,'
            f'"updated_at":"{T}"}}],"deleted":["x"]}}'
        ),
    ),
    (
        m.ExecutionAck(execution_id="e", status="accepted", reason=""),
        '{"execution_id":"e","status":"accepted","reason":""}',
    ),
    (
        m.ExecutionResult(
            execution_id="e", status="error", exit_code=-1, stdout="", stderr="", duration="350ms", finished_at=T
        ),
        (
            '{"execution_id":"e","status":"error","exit_code":-1,"stdout":"","stderr":"","duration":"350ms",'
            f'"finished_at":"{T}"}}'
        ),
    ),
    (
        m.ExecutionResult(
            execution_id="e",
            status="success",
            exit_code=0,
            stdout="ü\n<&>\u2028",
            stderr="\udcff",
            duration="0s",
            finished_at=T,
            triggered_by=CALLER,
        ),
        (
            '{"execution_id":"e","status":"success","exit_code":0,"stdout":"ü\\n<&>\u2028","stderr":"\ufffd",'
            f'"duration":"0s","finished_at":"{T}",'
            '"triggered_by":{"type":"session","session_id":"s","user_id":"u","email":"e"}}'
        ),
    ),
    (
        [
            m.MetricPoint(timestamp=T, group="g"),
            m.MetricPoint(timestamp=T, group="g", peer_id="p", data=JSONText("[]")),
        ],
        f'[{{"timestamp":"{T}","group":"g","data":null}},{{"timestamp":"{T}","group":"g","peer_id":"p","data":[]}}]',
    ),
    (
        (m.LogEntry(timestamp=T, source="journal", unit="", message="m", severity="info", hostname="h"),),
        f'[{{"timestamp":"{T}","source":"journal","unit":"","message":"m","severity":"info","hostname":"h"}}]',
    ),
    (
        [
            m.AuditEntry(
                timestamp=T,
                source="plexd",
                event_type="e",
                subject=JSONText("{}"),
                object=JSONText('{"a":1}'),
                action="a",
                result="unknown",
                hostname="h",
                raw="",
            )
        ],
        (
            f'[{{"timestamp":"{T}","source":"plexd","event_type":"e","subject":{{}},"object":{{"a":1}},"action":"a",'
            '"result":"unknown","hostname":"h","raw":""}]'
        ),
    ),
    (m.TunnelReady(listen_addr="10.0.0.1:1", timestamp=T), f'{{"listen_addr":"10.0.0.1:1","timestamp":"{T}"}}'),
    (
        m.TunnelClosed(reason="expired", duration="12m4s", timestamp=T),
        f'{{"reason":"expired","duration":"12m4s","timestamp":"{T}"}}',
    ),
    (
        m.IntegrityViolationReport(
            type="hook", path="/x", expected_checksum=SUM, actual_checksum=SUM, detail="", timestamp=T
        ),
        (
            f'{{"type":"hook","path":"/x","expected_checksum":"{SUM}","actual_checksum":"{SUM}","detail":"",'
            f'"timestamp":"{T}"}}'
        ),
    ),
]


def type_of(value: m.Model | Sequence[m.Model]) -> type[m.Model]:
    return type(value) if isinstance(value, m.Model) else type(value[0])


@pytest.mark.parametrize(("value", "text"), WRITTEN)
def test_request_is_written_exactly(value: m.Model | Sequence[m.Model], text: str) -> None:
    assert dump(value).decode() == text


@pytest.mark.parametrize(("value", "text"), WRITTEN)
def test_written_request_reads_back(value: m.Model | Sequence[m.Model], text: str) -> None:
    if isinstance(value, m.Model):
        back, skipped = read(type(value), text)
        assert dump(back).decode() == text
    else:
        elements, skipped = read_list(type(value[0]), text)
        assert dump(elements).decode() == text
    assert not skipped


def test_every_request_type_is_in_the_table() -> None:
    requests = {endpoint.request for endpoint in (*ENDPOINTS, *EXTENSIONS)} - {None}
    assert requests == {type_of(value) for value, _ in WRITTEN}


@pytest.mark.parametrize(("value", "text"), WRITTEN)
def test_request_without_one_of_its_members_is_refused_unless_it_may_be_left_out(
    value: m.Model | Sequence[m.Model], text: str
) -> None:
    model = type_of(value)
    document = json.loads(text)
    members = document if isinstance(document, dict) else document[0]
    optional = {name for name, field in model.model_fields.items() if not field.is_required()}
    for name in set(members) - optional:
        for broken in ({k: v for k, v in members.items() if k != name}, {**members, name: None}):
            with pytest.raises(WireError, match=name):
                read(model, json.dumps(broken))
    for name in members:
        if members[name] is None or model.model_fields[name].annotation is JSONText:
            continue
        with pytest.raises(WireError):
            read(model, json.dumps({**members, name: 5 if not isinstance(members[name], int) else "5"}))


@pytest.mark.parametrize(
    ("model", "members"),
    [
        (m.HeartbeatRequest, {"status": "fine"}),
        (m.HeartbeatRequest, {"uptime": "-1s"}),
        (m.HeartbeatRequest, {"uptime": "90"}),
        (m.HeartbeatRequest, {"timestamp": "yesterday"}),
        (m.HeartbeatRequest, {"timestamp": ""}),
        (m.HeartbeatRequest, {"timestamp": "0001-01-01T00:00:00Z"}),
    ],
)
def test_request_with_a_bad_value_is_refused(model: type[m.Model], members: dict[str, object]) -> None:
    good = {"node_id": "n", "timestamp": T, "status": "healthy", "uptime": "1s", "binary_checksum": ""}
    read(model, json.dumps(good))
    with pytest.raises(WireError, match=next(iter(members))):
        read(model, json.dumps({**good, **members}))


def test_drift_report_without_corrections_is_refused() -> None:
    with pytest.raises(WireError, match="corrections"):
        read(m.DriftReport, f'{{"timestamp":"{T}","corrections":[]}}')


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['type']}-{v['case']}")
def test_answer_of_a_go_program_is_read_and_written_back(vector: dict[str, Any]) -> None:
    model: type[m.Model] = getattr(m, vector["type"])
    value, skipped = read(model, json.dumps(vector["json"]))
    assert not skipped
    expected: dict[str, object] = {
        name: [] if member is None else "" if member == "0001-01-01T00:00:00Z" else member
        for name, member in vector["json"].items()
    }
    assert json.loads(dump(value)) == expected


@pytest.mark.parametrize("name", ANSWERS)
def test_empty_null_and_unknown_members_give_zero_values(name: str) -> None:
    model: type[m.Model] = getattr(m, name)
    zero, _ = read(model, "{}")
    nulls = json.dumps(dict.fromkeys(model.model_fields))
    for text in (nulls, '{"unknown":{"x":[1]},"X":5}'):
        value, skipped = read(model, text)
        assert value == zero
        assert not skipped


@pytest.mark.parametrize("name", ANSWERS)
def test_wrong_type_of_any_member_refuses_the_answer(name: str) -> None:
    model: type[m.Model] = getattr(m, name)
    for member in model.model_fields:
        for wrong in ("5.5", "[[]]" if member not in LISTS else '"x"'):
            if member == "parameters" or (wrong == "[[]]" and member in LISTS):
                continue
            with pytest.raises(WireError, match=member):
                read(model, f'{{"{member}":{wrong}}}')


LISTS = {
    name
    for answer in ANSWERS
    for name, field in getattr(m, answer).model_fields.items()
    if str(field.annotation).startswith("tuple")
}


def models() -> list[type[m.Model]]:
    return [v for v in vars(m).values() if isinstance(v, type) and issubclass(v, m.Model) and v is not m.Model]


@pytest.mark.parametrize("model", models(), ids=lambda model: model.__name__)
def test_secret_members_have_the_type_that_does_not_print(model: type[m.Model]) -> None:
    for name, field in model.model_fields.items():
        assert (name in SECRET_MEMBERS) == (field.annotation is SecretStr), name


def test_secrets_print_nowhere_but_in_the_document() -> None:
    peer, _ = read(m.Peer, '{"id":"p","psk":"geheim"}')
    state = m.StateResponse(peers=(peer,), data=(m.DataEntry(key="k", payload=JSONText('"geheim"')),))
    assert "geheim" not in f"{state} {state!r} {peer} {peer!r} {peer.psk}"
    assert dump(state).count(b"geheim") == 2
    with pytest.raises(ValidationError) as caught:
        m.RegisterResponse(node_id="n", node_secret_key=["geheim"])  # type: ignore[arg-type]
    assert "geheim" not in str(caught.value)


def test_optional_members_of_answers_are_left_out_when_empty() -> None:
    assert dump(m.UserAccessPeer(public_key=KEY)).decode() == f'{{"public_key":"{KEY}","allowed_ips":[],"label":""}}'
    assert dump(m.BridgeConfig()).decode() == '{"access_subnets":[],"enable_forwarding":true}'
    assert dump(m.BridgeConfig(enable_nat=False, enable_forwarding=False)).decode() == (
        '{"access_subnets":[],"enable_nat":false,"enable_forwarding":false}'
    )
    assert dump(m.SigningKeys(current=KEY)).decode() == f'{{"current":"{KEY}"}}'
    assert dump(m.StateResponse()).decode() == '{"peers":[],"policies":[],"data":[],"secret_refs":[]}'


def test_time_of_a_request_is_written_in_utc() -> None:
    ready = m.TunnelReady(listen_addr="", timestamp="2026-03-01T13:30:15.120+01:00")
    assert ready.timestamp == T


def test_parameters_of_an_action_keep_their_text() -> None:
    action, _ = read(m.ActionRequest, '{"parameters":{"a":1.0,"b":"x","c":null,"d":true,"e":[1e3]}}')
    assert action.parameters == {"a": "1.0", "b": '"x"', "d": "true", "e": "[1e3]"}
