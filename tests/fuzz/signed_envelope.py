"""The signed envelope, `plexd/wire/envelope.py`: only what was signed is believed, however it is written.

What an agent acts on must follow from the signed bytes alone. So the signed bytes are made a second time here, a
character at a time, and taken apart again; and of everything that arrives under the key of `ORIGINALS` only those are
believed. Seeds are sealed with that key: what changes them and still passes is a forgery.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any, NamedTuple, NoReturn

from nacl.signing import SigningKey

from plexd.errors import WireError
from plexd.mesh.desired import SigningKeys
from plexd.wire.envelope import Envelope, Outcome, Verifier, canonical_bytes, compact, parse_envelope, seal

KEY = SigningKey(bytes(range(32)))
NOW = 1_772_356_530.0  # 2026-03-01T09:15:30Z
WORDS = (
    b'"event_type"', b'"event_id"', b'"issued_at"', b'"nonce"', b'"payload"', b'"signature"', b"2026-03-01T09:15:00Z",
    b"+00:00", b"\\u003c", b"\\ud83d\\ude00", b"\\udc00", b"\xe2\x80\xa8", b"\\\\", b'\\"', b"null", b"1e5", b"-0",
)  # fmt: skip


class Meaning(NamedTuple):
    """What an agent acts on. Numbers in `payload` are texts, so that 1.0 is not 1."""

    event_type: str
    event_id: str
    issued: int | None
    nonce: str
    payload: Any


def check(data: bytes) -> None:
    text = data.decode("utf-8", "replace")  # the event stream gives nothing else
    try:
        members = members_of(text)
    except RecursionError:
        return
    try:
        envelope = parse_envelope(text)
    except WireError as exc:
        check_refusal(text, str(exc), members)
        return
    assert members is not None
    for name in ("event_type", "event_id", "issued_at", "nonce"):
        assert getattr(envelope, name) == members.get(name, "")
    assert envelope.signature == signature_in(members.get("signature", ""))
    signed = canonical_bytes(
        envelope.event_type, envelope.event_id, envelope.issued_at, envelope.nonce, envelope.payload
    )
    assert signed.decode() == canonical_text(envelope)
    assert compact(compact(envelope.payload)) == compact(envelope.payload)
    meaning = meaning_of(envelope)
    assert meaning_of(parse_envelope(signed.decode())) == meaning
    if verify(Verifier(KEYS), text) is Outcome.VERIFIED:
        assert meaning in ORIGINALS
    if envelope.issued is not None and envelope.nonce:
        sealed = seal(
            KEY,
            event_type=envelope.event_type,
            event_id=envelope.event_id,
            issued_at=envelope.issued_at,
            nonce=envelope.nonce,
            payload=envelope.payload,
        )
        assert meaning_of(parse_envelope(sealed)) == meaning
        verifier = Verifier(KEYS)
        assert verify(verifier, sealed, envelope.issued / 1e6) is Outcome.VERIFIED
        assert verify(verifier, sealed, envelope.issued / 1e6) is Outcome.REPLAYED


def check_refusal(text: str, reason: str, members: dict[str, Any] | None) -> None:
    assert verify(Verifier(KEYS), text) is Outcome.MALFORMED
    assert reason != "envelope is not JSON" or members is None


def verify(verifier: Verifier, text: str, now: float = NOW) -> Outcome:
    return verifier.verify(text, now=now, monotonic=0.0).outcome


def meaning_of(envelope: Envelope) -> Meaning:
    payload = json.loads(envelope.payload, parse_int=str, parse_float=str, object_pairs_hook=Members)
    return Meaning(envelope.event_type, envelope.event_id, envelope.issued, envelope.nonce, payload)


class Members(list[tuple[str, Any]]):
    """An object, with every member it has."""


def members_of(text: str) -> dict[str, Any] | None:
    """The members of one JSON object without a name twice, each surrogate without its other half replaced."""
    try:
        found = json.loads(text, object_pairs_hook=Members, parse_constant=_refuse)
    except ValueError:
        return None
    if not isinstance(found, Members) or len(dict(found)) != len(found):
        return None
    return {
        name: re.sub("[\ud800-\udfff]", "\ufffd", value) if isinstance(value, str) else value or ""
        for name, value in found
    }


def signature_in(text: str) -> bytes | None:
    """Empty when there is none, None when it is no Ed25519 signature in canonical base64: four bits are spare."""
    is_base64 = re.fullmatch(r"[A-Za-z0-9+/]{85}[AQgw]==", text, re.ASCII)
    return base64.b64decode(text) if is_base64 or not text else None


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)


def canonical_text(envelope: Envelope) -> str:
    """Section 3.1 of the events contract."""
    parts = re.fullmatch(r"([^.Z+]{19})(?:\.(\d+))?(.*)", envelope.issued_at)
    issued_at = ""
    if parts is not None:
        fraction = (parts[2] or "")[:9].rstrip("0")
        offset = "Z" if parts[3] in {"+00:00", "-00:00"} else parts[3]
        issued_at = parts[1] + ("." + fraction if fraction else "") + offset
    kind, number, nonce = map(_written, (envelope.event_type, envelope.event_id, envelope.nonce))
    return (
        f'{{"event_type":"{kind}","event_id":"{number}","issued_at":"{issued_at}","nonce":"{nonce}",'
        f'"payload":{_compacted(envelope.payload)}}}'
    )


def _written(text: str) -> str:
    short = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return "".join(short.get(c) or (f"\\u{ord(c):04x}" if c < " " or c in "<>&\u2028\u2029" else c) for c in text)


def _compacted(payload: str) -> str:
    written = ""
    inside = escaped = False
    for c in payload:
        if inside and c in "<>&\u2028\u2029":
            written += f"\\u{ord(c):04x}"
        elif inside or c not in " \t\r\n":
            written += c
        if c == '"' and not escaped:
            inside = not inside
        escaped = inside and c == "\\" and not escaped
    return written


KEYS = SigningKeys(bytes(KEY.verify_key))
SEALED = tuple(
    seal(KEY, event_type=kind, event_id=number, issued_at=issued_at, nonce=nonce, payload=payload)
    for kind, number, issued_at, nonce, payload in (
        ("peer_removed", "ev-1001", "2026-03-01T09:15:00Z", "q7Jm2x", '{"peer_id":"node-k3"}'),
        ("node_state_updated", "ev-1002", "2026-03-01T11:15:00.12+02:00", "a<b>&c", '{"z":[1.0,1e5,-0],"a":"x\\/é"}'),
        ("rotate_keys", "ev-1003", "2026-03-01T09:15:00.000+00:00", "n-ü\b\x01", "null"),
    )
)
ORIGINALS = tuple(meaning_of(parse_envelope(sealed)) for sealed in SEALED)
