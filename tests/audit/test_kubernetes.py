"""Lines of a Kubernetes audit log as entries."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.audit.entry import Entry
from plexd.audit.kubernetes import Malformed, Selection, normalise

EVENT: dict[str, Any] = {
    "kind": "Event", "apiVersion": "audit.k8s.io/v1", "level": "RequestResponse", "auditID": "0a1b",
    "stage": "ResponseComplete", "requestURI": "/apis/apps/v1/namespaces/web/deployments/shop/scale", "verb": "patch",
    "user": {"username": "ops@example.net", "uid": "u1", "groups": ["ops", "system:authenticated"]},
    "impersonatedUser": {"username": "system:serviceaccount:web:deployer"},
    "sourceIPs": ["192.0.2.14"], "userAgent": "kubectl/v1.30.1",
    "objectRef": {"resource": "deployments", "subresource": "scale", "namespace": "web", "name": "shop",
                  "apiGroup": "apps", "apiVersion": "v1"},
    "responseStatus": {"metadata": {}, "code": 200},
    "requestObject": {"spec": {"replicas": 3}}, "responseObject": {"data": {"password": "c2VjcmV0"}},
    "requestReceivedTimestamp": "2026-03-04T09:15:07.431002Z", "stageTimestamp": "2026-03-04T09:15:07.502313Z",
}  # fmt: skip


DEFAULT = Selection()


def made(selection: Selection = DEFAULT, **changes: Any) -> Entry | None:
    event = {key: value for key, value in (EVENT | changes).items() if value is not None}
    return normalise(json.dumps(event), selection, "edge-03", now=1772615708.5)


def entry(selection: Selection = DEFAULT, **changes: Any) -> Entry:
    found = made(selection, **changes)
    assert found is not None
    return found


def test_an_event_becomes_an_entry() -> None:
    found = entry()
    assert found._replace(raw="")._asdict() == {
        "timestamp": "2026-03-04T09:15:07.502313Z",
        "source": "k8s-audit",
        "event_type": "patch",
        "subject": {
            "username": "ops@example.net", "groups": ["ops", "system:authenticated"], "uid": "u1",
            "source_ips": ["192.0.2.14"], "user_agent": "kubectl/v1.30.1",
            "impersonated": "system:serviceaccount:web:deployer",
        },
        "object": {
            "resource": "deployments", "subresource": "scale", "namespace": "web", "name": "shop",
            "api_group": "apps", "api_version": "v1",
            "uri": "/apis/apps/v1/namespaces/web/deployments/shop/scale", "ref": "web/deployments/shop",
        },
        "action": "patch",
        "result": "success",
        "hostname": "edge-03",
        "raw": "",
    }  # fmt: skip
    assert json.loads(found.raw) == {k: v for k, v in EVENT.items() if k not in {"requestObject", "responseObject"}}


def test_bodies_stay_when_they_are_wanted() -> None:
    assert json.loads(entry(Selection(strip_bodies=False)).raw) == EVENT


@pytest.mark.parametrize(
    ("changes", "result"),
    [
        ({"responseStatus": {"code": 100}}, "success"),
        ({"responseStatus": {"code": 101}}, "success"),
        ({"responseStatus": {"code": 399}}, "success"),
        ({"responseStatus": {"code": 400}}, "failure"),
        ({"responseStatus": {"code": 503}}, "failure"),
        ({"responseStatus": {}}, "unknown"),
        ({"responseStatus": {"code": "200"}}, "unknown"),
        ({"responseStatus": {"code": True}}, "unknown"),
        ({"responseStatus": None}, "unknown"),
        ({"stage": "Panic"}, "failure"),
        ({"stage": "Panic", "responseStatus": None}, "failure"),
    ],
)
def test_how_it_ended(changes: dict[str, Any], result: str) -> None:
    assert entry(**changes).result == result


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ({"resource": "nodes"}, "nodes"),
        ({"resource": "nodes", "name": "edge-03"}, "nodes/edge-03"),
        ({"resource": "pods", "namespace": "web"}, "web/pods"),
        (None, "/healthz"),
        ({}, "/healthz"),
    ],
)
def test_what_it_was_about(reference: dict[str, str] | None, expected: str) -> None:
    found = entry(objectRef=reference, requestURI="/healthz").object
    assert found["ref"] == expected
    assert found["uri"] == "/healthz"


@pytest.mark.parametrize(
    ("changes", "timestamp"),
    [
        ({"stageTimestamp": None}, "2026-03-04T09:15:07.431002Z"),
        ({"stageTimestamp": "yesterday"}, "2026-03-04T09:15:07.431002Z"),
        ({"stageTimestamp": "2026-03-04T10:15:07+01:00"}, "2026-03-04T09:15:07Z"),
        ({"stageTimestamp": None, "requestReceivedTimestamp": None}, "2026-03-04T09:15:08.5Z"),
    ],
)
def test_when_it_was(changes: dict[str, Any], timestamp: str) -> None:
    assert entry(**changes).timestamp == timestamp


@pytest.mark.parametrize("stage", ["RequestReceived", "ResponseStarted", "", None])
def test_stages_without_an_outcome_are_filtered(stage: str | None) -> None:
    assert made(stage=stage) is None


def test_verbs_and_users_can_be_excluded() -> None:
    assert made(Selection(exclude_verbs=("get", "pat*"))) is None
    assert made(Selection(exclude_users=("system:*", "*@example.net"))) is None
    assert made(Selection(exclude_verbs=("get",), exclude_users=("system:*",))) is not None


@pytest.mark.parametrize("line", ["", "{", "[]", "7", "null", '{"a":NaN}', "[" * 100_000, '{"a":' + "9" * 5000 + "}"])
def test_a_line_that_is_no_event_is_malformed(line: str) -> None:
    with pytest.raises(Malformed):
        normalise(line, DEFAULT, "edge-03", 0.0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.dictionaries(st.sampled_from([key for key in EVENT if key != "stage"]), JSON))
def test_whatever_an_event_holds_it_becomes_an_entry(changes: dict[str, Any]) -> None:
    found = normalise(json.dumps(EVENT | changes), DEFAULT, "edge-03", 0.0)
    assert found is not None
    assert found.result in {"success", "failure", "unknown"}
