from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.errors import WireError
from plexd.wire.models import (
    DataEntry,
    EndpointResponse,
    HeartbeatResponse,
    LogEntry,
    Policy,
    RegisterRequest,
    SecretRef,
    StateResponse,
)
from plexd.wire.reading import MAX_FAULTS, JSONText, Skipped, load, read, read_list
from plexd.wire.writing import dump

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


@pytest.mark.parametrize(
    "data",
    [
        b"", b" ", b"{", b"{}{}", b"{} x", b"{'a':1}", b'{"a":1,}', b"[1,]", b"// c\n{}", b'{"a":NaN}', b"[Infinity]",
        b"[-Infinity]", b"\xef\xbb\xbf{}", b'{"a":"\xff"}', b'{"a":"\n"}', b'{"a":"\\x"}', b"[01]", b"[1.]", b"[.5]",
        b"[" * 100_000, b'{"a":' * 100_000, b'"\\ud8"', b"nul", b"\x00",
    ],
    ids=lambda data: data[:20].decode("latin-1"),
)  # fmt: skip
def test_what_is_not_one_json_document_is_refused(data: bytes) -> None:
    with pytest.raises(WireError, match=r"^document "):
        load(data)


def test_error_of_a_document_names_the_place_and_not_the_content() -> None:
    with pytest.raises(WireError) as caught:
        load(b'{"psk":"geheim" "token":"geheim"}')
    assert str(caught.value) == "document is not JSON: Expecting ',' delimiter at character 16"


def test_last_of_duplicate_members_wins() -> None:
    assert load(b'{"a":1,"a":2}') == {"a": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r'"\ud800"', "\ufffd"), (r'"\udc00\ud800x"', "\ufffd\ufffdx"), (r'"\ud83d\ude00"', "😀"),
        (r'"\uD83D\uDE00"', "😀"), (r'"\ud83d\ud83d\ude00"', "\ufffd😀"), (r'"\\ud800"', r"\ud800"),
        (r'"\\\ud800"', "\\\ufffd"), (r'"\ud800\n"', "\ufffd\n"), (r'"\ud7ff\ue000"', "\ud7ff\ue000"),
    ],
)  # fmt: skip
def test_unpaired_surrogate_reads_as_the_replacement_character(text: str, value: str) -> None:
    assert load(text) == value


@pytest.mark.parametrize(
    "text",
    ["1.0", "1e5", "-0", "-0.0", "12345678901234567890", "9" * 5000, "0.10", "1E+2", "true", "null", '"x"', "[]", "{}",
     '{"z":[1.0,{"y":-0}],"a":"é <&>","m":1e-7}', '"\u2028"', '"\\u0000\\""'],
)  # fmt: skip
def test_arbitrary_json_keeps_numbers_and_order(text: str) -> None:
    entry, skipped = read(DataEntry, f'{{"payload": {text} }}')
    assert entry.payload == text
    assert not skipped
    assert f'"payload":{text},'.encode() in dump(entry)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_arbitrary_json_keeps_its_value(value: object) -> None:
    entry, _ = read(DataEntry, json.dumps({"payload": value}))
    assert json.loads(entry.payload) == value


def test_json_text_does_not_print() -> None:
    assert repr(JSONText.of({"a": "geheim"})) == "JSONText(14 characters)"
    with pytest.raises(ValueError, match="not JSON compliant"):
        JSONText.of(float("nan"))


@pytest.mark.parametrize("number", ["3.0", "3e0", '"3"', "true", "[3]", "{}", str(2**63), str(-(2**63) - 1)])
def test_integer_is_a_number_without_fraction_in_64_bits(number: str) -> None:
    with pytest.raises(WireError, match=r"^SecretRef: version should be "):
        read(SecretRef, f'{{"version":{number}}}')


@pytest.mark.parametrize(("number", "value"), [("3", 3), ("-0", 0), (str(2**63 - 1), 2**63 - 1), ("null", 0)])
def test_integer_is_read(number: str, value: int) -> None:
    assert read(SecretRef, f'{{"version":{number}}}')[0].version == value


@pytest.mark.parametrize("value", ["1", "0", '"true"', "[]"])
def test_only_true_and_false_are_booleans(value: str) -> None:
    with pytest.raises(WireError):
        read(HeartbeatResponse, f'{{"reconcile":{value}}}')


def test_names_are_matched_exactly_and_unknown_ones_ignored() -> None:
    answer, skipped = read(HeartbeatResponse, '{"Reconcile":true,"rotate_keys":true,"x":{"reconcile":[]}}')
    assert (answer.reconcile, answer.rotate_keys, skipped) == (False, True, ())


def test_bad_elements_are_skipped_with_place_id_and_reason() -> None:
    state, skipped = read(
        StateResponse,
        json.dumps(
            {
                "peers": [
                    {"id": "a", "psk": 5, "public_key": 5},
                    {"id": "b", "allowed_ips": ["10.0.0.1", 7, None, "10.0.0.2"]},
                    None,
                    "x",
                    {"peer_id": "c", "allowed_ips": "10.0.0.1"},
                ],
                "data": [{"key": "k", "version": 1.5}, {"key": "l", "updated_at": "yesterday"}, {"key": "m"}],
                "secret_refs": [{"key": 5}],
                "relay_config": {"sessions": [{"session_id": "s", "expires_at": 5}, {"session_id": "t"}]},
            }
        ),
    )
    assert [peer.id for peer in state.peers] == ["b"]
    assert state.peers[0].allowed_ips == ("10.0.0.1", "10.0.0.2")
    assert [entry.key for entry in state.data] == ["m"]
    assert state.relay_config is not None
    assert [session.session_id for session in state.relay_config.sessions] == ["t"]
    assert [(fault.path, fault.id) for fault in skipped] == [
        ("peers[0]", "a"),
        ("peers[1].allowed_ips[1]", "b"),
        ("peers[1].allowed_ips[2]", "b"),
        ("peers[2]", ""),
        ("peers[3]", ""),
        ("peers[4]", "c"),
        ("relay_config.sessions[0]", "s"),
        ("data[0]", "k"),
        ("data[1]", "l"),
        ("secret_refs[0]", ""),
    ]
    assert skipped[0] == Skipped("peers[0]", "a", "public_key should be a valid string")
    assert skipped[8].reason == "updated_at is not an RFC 3339 time"


@pytest.mark.parametrize(
    "document",
    ["[]", "5", '"x"', "null", "true", '{"peers":{}}', '{"peers":"abc"}', '{"peers":5}', '{"policies":{"id":"x"}}',
     '{"data":true}', '{"secret_refs":1}', '{"metadata":[]}', '{"metadata":{"a":1}}', '{"signing_keys":"x"}',
     '{"signing_keys":{"current":5}}', '{"bridge_config":[]}', '{"bridge_config":{"enable_nat":"yes"}}',
     '{"relay_config":{"sessions":{}}}'],
)  # fmt: skip
def test_wrong_type_outside_a_list_refuses_the_document(document: str) -> None:
    with pytest.raises(WireError, match=r"^StateResponse: "):
        read(StateResponse, document)


def test_missing_and_null_lists_can_be_told_apart() -> None:
    assert read(StateResponse, "{}")[0].model_fields_set == set()
    state, _ = read(StateResponse, '{"peers":null,"policies":null,"data":null,"metadata":null,"bridge_config":null}')
    assert state.model_fields_set == {"peers", "policies"}
    assert (state.peers, state.policies, state.data) == ((), (), ())
    assert state.metadata == {}


def test_null_in_a_map_is_an_absent_member() -> None:
    assert read(StateResponse, '{"metadata":{"a":null,"b":"x"}}')[0].metadata == {"b": "x"}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ('{"src":"a","dst":"b","port":5,"protocol":"tcp","action":"deny"}', ("a", "b", 5, "tcp", "deny")),
        ('{"src":5,"dst":null,"port":"5","protocol":[],"action":true}', ("", "", -1, "invalid", "")),
        ('{"port":true}', ("", "", -1, "", "")),
        ('{"port":80.0}', ("", "", -1, "", "")),
        ('{"port":99999999999999999999}', ("", "", -1, "", "")),
        ("null", ("", "", 0, "", "")),
        ('"x"', ("", "", 0, "", "")),
    ],
)
def test_damaged_policy_rule_stays_in_its_place_and_allows_nothing(
    rule: str, expected: tuple[str, str, int, str, str]
) -> None:
    policy, skipped = read(Policy, f'{{"id":"p","rules":[{rule},{{"src":"*"}}]}}')
    first = policy.rules[0]
    assert (first.src, first.dst, first.port, first.protocol, first.action) == expected
    assert len(policy.rules) == 2
    assert not skipped


def test_document_with_nothing_but_faults_is_refused_quickly() -> None:
    with pytest.raises(WireError, match="faults"):
        read(EndpointResponse, '{"peer_endpoints":[' + ",".join(["0"] * (MAX_FAULTS + 1)) + "]}")


def test_deep_payload_is_refused_or_kept_and_never_a_crash() -> None:
    for depth in range(100, 1200, 50):
        try:
            entry, _ = read(DataEntry, '{"payload":' + "[" * depth + "]" * depth + "}")
        except WireError:
            continue
        assert entry.payload == "[" * depth + "]" * depth


def test_list_of_models_is_read() -> None:
    good = {"timestamp": "2026-03-01T12:00:00Z", "source": "journal", "unit": "u", "message": "m", "severity": "info",
            "hostname": "h"}  # fmt: skip
    entries, skipped = read_list(LogEntry, json.dumps([good, {**good, "severity": "loud"}, good]))
    assert len(entries) == 2
    assert [fault.path for fault in skipped] == ["[1]"]
    with pytest.raises(WireError, match="list of LogEntry: should be a valid list"):
        read_list(LogEntry, "{}")


@pytest.mark.parametrize("member", ["token", "metadata"])
def test_message_about_a_request_holds_no_value(member: str) -> None:
    with pytest.raises(WireError) as caught:
        read(RegisterRequest, json.dumps({"token": "geheim", "public_key": KEY, "hostname": "h", member: ["geheim"]}))
    assert "geheim" not in str(caught.value)
