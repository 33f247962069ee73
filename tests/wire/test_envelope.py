from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from plexd.errors import WireError
from plexd.mesh.desired import SigningKeys
from plexd.wire.envelope import (
    NONCE_LIMIT,
    Envelope,
    Outcome,
    Verifier,
    canonical_bytes,
    compact,
    parse_envelope,
    seal,
)
from plexd.wire.times import format_time, parse_time

VECTORS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("vectors").joinpath("envelopes.json").read_text())
KEY = SigningKey(bytes(range(32)))
KEYS = SigningKeys(bytes(KEY.verify_key))
OTHER_KEY = SigningKey(bytes(range(1, 33)))
ISSUED = "2026-03-01T09:15:00Z"
NOW = parse_time(ISSUED) or 0.0

# wire, signature, size of the signed bytes, their SHA-256
PRINTED = [
    (
        (
            b'{"event_type":"peer_removed","event_id":"ev-1001","issued_at":"2026-03-01T09:15:00Z","nonce":"q7Jm2x",'
            b'"payload":{"peer_id":"node-k3"}}'
        ),
        "sKG4xHAAP6drU6TqpLk1m3t3PBxgXfzOKYRx6dnCPfzUGPn41pppReSqn+BkskuhEfi2TbbKRwMhTkQxhdz1Aw==",
        134,
        "18cf3d8328f8589786bcf458a8ffc5bf7170e62f2cd03da0be6f0cd75971d7c5",
    ),
    (
        base64.b64decode(
            "eyAibm9uY2UiIDogImE8Yj4mYyIsICJwYXlsb2FkIiA6IHsgInoiIDogWyAxLjAsIDFlNSwgLTAgXSwJImEiIDogInhcL3kgPHRhZz4g"
            "4oCoIMOpIFx1MDBlOSIgfSwgImV2ZW50X2lkIjoiZXYtMTAwMiIsICJpc3N1ZWRfYXQiOiIyMDI2LTAzLTAxVDExOjE1OjAwLjEyMDAw"
            "MDAwMCswMjowMCIsICJldmVudF90eXBlIjoibm9kZV9zdGF0ZV91cGRhdGVkIiwgImV4dHJhIjp0cnVlLCAic2lnbmF0dXJlIjoiIiB9"
        ),
        "Leu88pru8Zl4DssuT07/fuKUBfB7cGmtHoqbOQPH7cKFOmnco3V9EuVmQ+oshCl53Z4hmr5FHKsQS+UCpCplAw==",
        204,
        "389dfc4b2b34335a0d046e0c9baff0cd2e240e0b07330b03ddbf71e4106004c0",
    ),
    (
        (
            rb'{"event_type":"rotate_keys","event_id":"ev-1003","issued_at":"2026-03-01T09:15:00.000+00:00",'
            rb'"nonce":"n-\u00fc\b\u0001","payload":null}'
        ),
        "K33u7qZn797Zmu6L/kwNtf2vn9QsoAmgynFWTMUntH1CI72sE2IePYe5oZa+QEFvOVsxgk4JPzKCapJemMTGCA==",
        122,
        "bb1f30258fd62599adcc5a83750e7c3038c3f60dddd174b1d49c6c0333cc35d8",
    ),
    (
        (
            rb'{"event_type":"rotate_keys","event_id":"ev-1003","issued_at":"2026-03-01T09:15:00.000+00:00",'
            rb'"nonce":"n-\u00fc\b\u0001"}'
        ),
        "K33u7qZn797Zmu6L/kwNtf2vn9QsoAmgynFWTMUntH1CI72sE2IePYe5oZa+QEFvOVsxgk4JPzKCapJemMTGCA==",
        122,
        "bb1f30258fd62599adcc5a83750e7c3038c3f60dddd174b1d49c6c0333cc35d8",
    ),
]


def canonical(envelope: Envelope) -> bytes:
    return canonical_bytes(envelope.event_type, envelope.event_id, envelope.issued_at, envelope.nonce, envelope.payload)


def sealed(**changes: str) -> str:
    members = {"event_type": "peer_removed", "event_id": "ev-1", "issued_at": ISSUED, "nonce": "n-1", "payload": "{}"}
    return seal(KEY, **{**members, **changes})


def outcome(wire: str, *, now: float = NOW, verifier: Verifier | None = None) -> Outcome:
    return (verifier or Verifier(KEYS)).verify(wire, now=now, monotonic=0.0).outcome


def with_member(wire: str, name: str, text: str | None) -> str:
    """The same object with the JSON text of one member replaced, or without it."""
    members = {key: json.dumps(value) for key, value in json.loads(wire).items()}
    members.pop(name)
    if text is not None:
        members[name] = text
    return "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in members.items()) + "}"


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
def test_vector(vector: dict[str, Any]) -> None:
    assert canonical(parse_envelope(vector["wire"])).hex() == vector["canonical_hex"]
    previous = vector.get("previous_public_key")
    keys = SigningKeys(
        base64.b64decode(vector["public_key"]),
        base64.b64decode(previous) if previous else None,
        parse_time(vector.get("previous_expires", "")) or 0.0,
    )
    now = parse_time(vector["now"])
    assert now is not None
    assert (outcome(vector["wire"], now=now, verifier=Verifier(keys)) is Outcome.VERIFIED) == vector["valid"]


@pytest.mark.parametrize(("wire", "signature", "size", "digest"), PRINTED)
def test_printed_vector(wire: bytes, signature: str, size: int, digest: str) -> None:
    envelope = parse_envelope(wire.decode())
    signed = canonical(envelope)
    assert len(signed) == size
    assert hashlib.sha256(signed).hexdigest() == digest
    KEY.verify_key.verify(signed, base64.b64decode(signature))
    unsigned = re.sub(r', "signature" ?: ?""', "", wire.decode())
    assert outcome(f'{unsigned.rstrip()[:-1]},"signature":"{signature}"}}') is Outcome.VERIFIED


@pytest.mark.parametrize("vector", [v for v in VECTORS if v["valid"]], ids=lambda v: v["name"])
def test_every_change_of_a_byte_is_refused_or_changes_nothing_that_is_signed(vector: dict[str, Any]) -> None:
    original = parse_envelope(vector["wire"])
    previous = vector.get("previous_public_key")
    keys = SigningKeys(base64.b64decode(vector["public_key"]), base64.b64decode(previous) if previous else None, 1e12)
    now = parse_time(vector["now"])
    assert now is not None
    wire = vector["wire"]
    for place in range(len(wire)):
        for mutant in (
            wire[:place] + chr(ord(wire[place]) ^ 1) + wire[place + 1 :],
            wire[:place] + wire[place + 1 :],
            wire[:place] + " " + wire[place:],
        ):
            result = Verifier(keys).verify(mutant, now=now, monotonic=0.0)
            if result.outcome is Outcome.VERIFIED:
                assert result.envelope is not None
                assert canonical(result.envelope) == canonical(original)
                assert result.envelope.signature == original.signature


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def go_html(text: str) -> str:
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@given(TEXTS, TEXTS, VALUES, st.sampled_from([None, 0, 1, "\t", " \r\n"]), st.booleans())
def test_spelling_of_the_wire_does_not_matter(
    event_id: str, nonce: str, payload: object, indent: int | str | None, ascii_only: bool
) -> None:
    raw = json.dumps(payload, ensure_ascii=ascii_only, separators=(",", ":"))
    wire = seal(KEY, event_type="t", event_id=event_id, issued_at=ISSUED, nonce=nonce, payload=raw)
    spaced = json.dumps(payload, ensure_ascii=ascii_only, indent=indent, separators=(" , ", " : "))
    respelled = json.dumps({k: v for k, v in json.loads(wire).items() if k != "payload"}, ensure_ascii=ascii_only)
    respelled = f'{respelled[:-1]},\n"payload" : {spaced}\t}}\r\n'
    assert compact(spaced) == go_html(raw)
    assert canonical(parse_envelope(respelled)) == canonical(parse_envelope(wire))
    assert outcome(respelled) is outcome(wire) is Outcome.VERIFIED


@pytest.mark.parametrize(
    ("payload", "compacted"),
    [
        (r' [ "a\\" , " b c \\\" d " , "\\\\" , " e \" " ] ', r'["a\\"," b c \\\" d ","\\\\"," e \" "]'),
        ("\t{\r\n}\n", "{}"),
        ("1 ", "1"),
        (r'{ "\/" : "\u00e9 \u003C" , "<" : "&\n" }', r'{"\/":"\u00e9 \u003C","\u003c":"\u0026\n"}'),
        ('["\u2028 \u2029", 1.0, 1e5, -0]', r'["\u2028 \u2029",1.0,1e5,-0]'),
    ],
)
def test_payload_is_compacted_and_nothing_else(payload: str, compacted: str) -> None:
    json.loads(payload)
    assert compact(payload) == compacted


def test_characters_of_signed_strings_are_written_as_go_does() -> None:
    text = "".join(map(chr, range(0x80))) + "\u2028\u2029é😀/"
    expected = (
        '"\\u0000\\u0001\\u0002\\u0003\\u0004\\u0005\\u0006\\u0007\\b\\t\\n\\u000b\\f\\r\\u000e\\u000f'
        + "".join(f"\\u{code:04x}" for code in range(0x10, 0x20))
        + " !\\\"#$%\\u0026'()*+,-./0123456789:;\\u003c=\\u003e?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\\\]^_`"
        + 'abcdefghijklmnopqrstuvwxyz{|}~\x7f\\u2028\\u2029é😀/"'
    )
    assert f'"nonce":{expected},'.encode() in canonical_bytes("t", "i", ISSUED, text, "null")


def test_unpaired_surrogate_is_signed_as_the_replacement_character() -> None:
    envelope = parse_envelope(r'{"event_type":"t","event_id":"\ud800x\ud83d\ude00","payload":"\ud800"}')
    assert envelope.event_id == "\ufffdx😀"
    assert b'"payload":"\\ud800"' in canonical_bytes("t", "i", ISSUED, "n", envelope.payload)


@pytest.mark.parametrize(
    "wire",
    [
        "", "null", "[]", '"x"', "{", "{}", '{"event_type":"t"}', '{"event_id":"i"}', "\ufeff{}",
        '{"event_type":"t","event_id":"i"} x', '{"event_type":"t","event_id":"i"}{}',
        '{"event_type":"t","event_id":"i",}',
        '{"event_type":"t" "event_id":"i"}', '{"event_type" "t","event_id":"i"}', "{'event_type':'t','event_id':'i'}",
        '{,"event_type":"t","event_id":"i"}', '{"event_type":"t","event_id":"i"',
        '{"event_type":"t","event_type":"t","event_id":"i"}', '{"event_type":"t","event_id":"i","x":1,"x":1}',
        r'{"event_type":"t","event_id":"i","payload":1,"p\u0061yload":1}',
        '{"event_type":"","event_id":"i"}', '{"event_type":null,"event_id":"i"}', '{"event_type":5,"event_id":"i"}',
        '{"event_type":["t"],"event_id":"i"}', '{"event_type":"t","event_id":true}',
        '{"event_type":"t","event_id":"i","nonce":7}', '{"event_type":"t","event_id":"i","signature":{}}',
        '{"event_type":"t","event_id":"i","issued_at":1772366400}',
        '{"event_type":"t","event_id":"i","issued_at":"now"}',
        '{"event_type":"t","event_id":"i","issued_at":"2026-02-30T00:00:00Z"}',
        '{"event_type":"t","event_id":"i","payload":NaN}', '{"event_type":"t","event_id":"i","payload":[-Infinity]}',
        '{"event_type":"t","event_id":"i","payload":"\n"}', '{"event_type":"t","event_id":"i","payload":01}',
        '{"event_type":"t","event_id":"i","payload":}', '{"event_type":"t","event_id":"i","payload":"\\x"}',
        '{"event_type":"t","event_id":"i","payload":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"event_type":"' + "t" * 129 + '","event_id":"i"}', '{"event_type":"t","event_id":"' + "i" * 257 + '"}',
        '{"event_type":"t","event_id":"i","nonce":"' + "n" * 257 + '"}',
    ],
    ids=lambda wire: wire[:60],
)  # fmt: skip
def test_malformed_envelope_is_refused(wire: str) -> None:
    with pytest.raises(WireError):
        parse_envelope(wire)
    assert outcome(wire) is Outcome.MALFORMED


def test_longest_texts_and_unknown_members_are_taken() -> None:
    wire = sealed(event_type="t" * 128, event_id="i" * 256, nonce="é" * 256)
    assert outcome(wire[:-1] + ',"extra":[1,{"a":null}]}') is Outcome.VERIFIED


GOOD_SIGNATURE = json.loads(sealed())["signature"]
LAST = GOOD_SIGNATURE[85]  # four bits of it belong to no byte
UNCANONICAL = GOOD_SIGNATURE[:85] + chr(ord(LAST) + 1) + "=="


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("signature", None, Outcome.UNSIGNED),
        ("signature", "null", Outcome.UNSIGNED),
        ("signature", '""', Outcome.UNSIGNED),
        ("nonce", None, Outcome.NO_NONCE),
        ("nonce", "null", Outcome.NO_NONCE),
        ("nonce", '""', Outcome.NO_NONCE),
        ("issued_at", None, Outcome.NO_TIMESTAMP),
        ("issued_at", "null", Outcome.NO_TIMESTAMP),
        ("issued_at", '""', Outcome.NO_TIMESTAMP),
        ("issued_at", '"0001-01-01T00:00:00Z"', Outcome.NO_TIMESTAMP),
        ("signature", '"AAAA"', Outcome.BAD_SIGNATURE),
        ("signature", '"*"', Outcome.BAD_SIGNATURE),
        ("signature", f'"{GOOD_SIGNATURE.rstrip("=")}"', Outcome.BAD_SIGNATURE),
        ("signature", json.dumps(GOOD_SIGNATURE + "\n"), Outcome.BAD_SIGNATURE),
        ("signature", f'"{UNCANONICAL}"', Outcome.BAD_SIGNATURE),
        ("payload", '{"peer_id":"x"}', Outcome.BAD_SIGNATURE),
        ("payload", "{ }", Outcome.VERIFIED),
        ("event_id", '"ev-2"', Outcome.BAD_SIGNATURE),
        ("event_type", '"peer_added"', Outcome.BAD_SIGNATURE),
        ("nonce", '"n-2"', Outcome.BAD_SIGNATURE),
        ("issued_at", '"2026-03-01T09:15:00.5Z"', Outcome.BAD_SIGNATURE),
        ("issued_at", '"2026-03-01T09:15:00.0Z"', Outcome.VERIFIED),
        ("issued_at", '"2026-03-01T10:15:00+01:00"', Outcome.BAD_SIGNATURE),
    ],
)
def test_one_member_changed(name: str, text: str | None, expected: Outcome) -> None:
    assert outcome(with_member(sealed(), name, text)) is expected


def test_uncanonical_signature_stands_for_the_same_bytes() -> None:
    assert base64.b64decode(UNCANONICAL) == base64.b64decode(GOOD_SIGNATURE)


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        ('{"event_type":"t","event_id":"i"}', Outcome.UNSIGNED),
        ('{"event_type":"t","event_id":"i","signature":"x"}', Outcome.NO_NONCE),
        ('{"event_type":"t","event_id":"i","signature":"x","nonce":"n"}', Outcome.NO_TIMESTAMP),
        (
            '{"event_type":"t","event_id":"i","signature":"x","nonce":"n","issued_at":"2026-03-01T09:00:00Z"}',
            Outcome.STALE,
        ),
        (
            '{"event_type":"t","event_id":"i","signature":"x","nonce":"n","issued_at":"2026-03-01T09:30:00Z"}',
            Outcome.FUTURE,
        ),
        (
            '{"event_type":"t","event_id":"i","signature":"x","nonce":"n","issued_at":"2026-03-01T09:15:00Z"}',
            Outcome.BAD_SIGNATURE,
        ),
    ],
)
def test_first_failing_check_decides(wire: str, expected: Outcome) -> None:
    assert outcome(wire) is expected


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.123456, 0.7])
def test_exactly_five_minutes_are_fresh_and_a_millisecond_more_is_not(fraction: float) -> None:
    wire = sealed(issued_at=format_time(NOW + fraction))
    issued = NOW + fraction
    assert outcome(wire, now=issued + 300) is Outcome.VERIFIED
    assert outcome(wire, now=issued - 300) is Outcome.VERIFIED
    assert outcome(wire, now=issued + 300.001) is Outcome.STALE
    assert outcome(wire, now=issued - 300.001) is Outcome.FUTURE


def test_previous_key_counts_until_its_time_is_over() -> None:
    keys = SigningKeys(bytes(OTHER_KEY.verify_key), bytes(KEY.verify_key), NOW + 10)
    assert outcome(sealed(), now=NOW + 9.999, verifier=Verifier(keys)) is Outcome.VERIFIED
    assert outcome(sealed(), now=NOW + 10, verifier=Verifier(keys)) is Outcome.BAD_SIGNATURE


def test_previous_key_cannot_choose_its_successor() -> None:
    wire = sealed(event_type="signing_key_rotated")
    keys = SigningKeys(bytes(OTHER_KEY.verify_key), bytes(KEY.verify_key), NOW + 10)
    assert outcome(wire, verifier=Verifier(keys)) is Outcome.BAD_SIGNATURE
    assert outcome(wire) is Outcome.VERIFIED


def test_without_keys_nothing_is_believed_and_new_keys_count_at_once() -> None:
    verifier = Verifier(None)
    assert outcome(sealed(), verifier=verifier) is Outcome.BAD_SIGNATURE
    verifier.replace_keys(KEYS)
    assert outcome(sealed(), verifier=verifier) is Outcome.VERIFIED
    verifier.replace_keys(SigningKeys(bytes(OTHER_KEY.verify_key)))
    assert outcome(sealed(nonce="n-2"), verifier=verifier) is Outcome.BAD_SIGNATURE


def test_replay_is_refused_and_a_forgery_burns_no_nonce() -> None:
    verifier = Verifier(KEYS)
    forged = with_member(sealed(), "payload", "1")
    assert outcome(forged, verifier=verifier) is Outcome.BAD_SIGNATURE
    assert outcome(sealed(), verifier=verifier) is Outcome.VERIFIED
    again = verifier.verify(sealed(), now=NOW, monotonic=0.0)
    assert (again.outcome, again.same_event) == (Outcome.REPLAYED, True)
    other = verifier.verify(sealed(event_id="ev-2"), now=NOW, monotonic=0.0)
    assert (other.outcome, other.same_event) == (Outcome.REPLAYED, False)


def test_nonces_survive_a_change_of_keys_but_not_of_identity() -> None:
    verifier = Verifier(KEYS)
    assert outcome(sealed(), verifier=verifier) is Outcome.VERIFIED
    verifier.replace_keys(KEYS)
    assert outcome(sealed(), verifier=verifier) is Outcome.REPLAYED
    verifier.forget_nonces()
    assert outcome(sealed(), verifier=verifier) is Outcome.VERIFIED


def test_nonce_is_kept_for_eleven_minutes_and_as_long_as_the_event_is_fresh() -> None:
    verifier = Verifier(KEYS)

    def verify(nonce: str, monotonic: float, now: float = NOW) -> Outcome:
        return verifier.verify(sealed(nonce=nonce), now=now, monotonic=monotonic).outcome

    assert verify("a", 0.0) is Outcome.VERIFIED
    assert verify("b", 659.0, NOW + 300) is Outcome.VERIFIED  # cleans up
    assert verify("a", 659.0) is Outcome.REPLAYED
    assert verify("c", 720.0, NOW + 300) is Outcome.VERIFIED  # cleans up; the wall clock has stood still
    assert verify("a", 720.0) is Outcome.REPLAYED
    late = verifier.verify(
        sealed(nonce="d", issued_at="2026-03-01T09:20:01Z"), now=NOW + 301, monotonic=780.0
    )  # cleans up
    assert late.outcome is Outcome.VERIFIED
    assert set(verifier._nonces) == {"b", "c", "d"}


def test_too_many_nonces_drop_the_oldest() -> None:
    verifier = Verifier(KEYS)
    assert outcome(sealed(nonce="first"), verifier=verifier) is Outcome.VERIFIED
    sample = verifier._nonces["first"]
    verifier._nonces.update((str(i), sample) for i in range(NONCE_LIMIT - 1))
    assert verifier.evicted == 0
    assert outcome(sealed(nonce="last"), verifier=verifier) is Outcome.VERIFIED
    assert verifier.evicted == 1
    assert len(verifier._nonces) == NONCE_LIMIT
    assert "first" not in verifier._nonces
