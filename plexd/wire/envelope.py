"""The signed envelope around every event: taking it apart, the bytes its signature covers, and the order of checks.

The signature covers what Go's encoding/json would write, so the payload is never parsed and written again: its raw
text is found while scanning the envelope, and only compacted (docs/contract/events.md §3 and §4). Clocks are arguments.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from enum import StrEnum
from typing import NamedTuple, NoReturn

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from plexd.errors import WireError
from plexd.mesh.desired import SigningKeys
from plexd.wire.times import parse_nanoseconds, signed_form

FRESHNESS = 300.0  # seconds, inclusive, into the past and into the future
NONCE_RETENTION = 660.0  # seconds after receipt
NONCE_LIMIT = 100_000
_NONCE_CLEANING_INTERVAL = 60.0
_SIGNATURE_BYTES = 64
_MICROSECONDS = 1_000_000

_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TO_ESCAPE = re.compile('["\\\\\x00-\x1f<>&\u2028\u2029]')
_ESCAPES = {
    **{chr(code): f"\\u{code:04x}" for code in (*range(0x20), ord("<"), ord(">"), ord("&"), 0x2028, 0x2029)},
    '"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t",
}  # fmt: skip
# what compacting changes at all; in JSON, white space but the blank stands only outside strings, and these five inside
_TO_COMPACT = re.compile("[ \t\n\r<>&\u2028\u2029]")
_COMPACT = (
    ("\t", ""), ("\n", ""), ("\r", ""), ("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"), ("\u2028", "\\u2028"),
    ("\u2029", "\\u2029"),
)  # fmt: skip

_LENGTHS = {"event_type": 128, "event_id": 256, "nonce": 256}
_TEXTS = frozenset({"event_type", "event_id", "issued_at", "nonce", "signature"})


class Outcome(StrEnum):
    """Why an event is not believed; in the order of the checks."""

    MALFORMED = "malformed"
    UNSIGNED = "unsigned"
    NO_NONCE = "no_nonce"
    NO_TIMESTAMP = "no_timestamp"
    STALE = "stale"
    FUTURE = "future"
    BAD_SIGNATURE = "bad_signature"
    REPLAYED = "replayed"
    VERIFIED = "verified"


class Envelope(NamedTuple):
    """`issued` is in Unix microseconds, None when not set; `payload` is the JSON text as it stood on the wire.

    `signature` is None when the text is not canonical base64 of 64 bytes, empty when there was none.
    """

    event_type: str
    event_id: str
    issued_at: str
    issued: int | None
    nonce: str
    payload: str
    signature: bytes | None


class Verdict(NamedTuple):
    """`envelope` is None when it was malformed; `same_event`: replayed under the event id of its first sighting."""

    outcome: Outcome
    envelope: Envelope | None = None
    reason: str = ""
    same_event: bool = False


class _Nonce(NamedTuple):
    received: float  # monotonic
    fresh_until: float  # Unix
    event_id: str


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


# values are scanned for their end only, so numbers need not become numbers
_scan = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=_refuse_constant).scan_once  # type: ignore[attr-defined]


def parse_envelope(text: str) -> Envelope:
    """Take the data of an event apart; WireError says why it is malformed."""
    try:
        members, payload = _scan_members(text)
    except StopIteration:
        raise WireError("envelope is not JSON") from None
    except RecursionError:
        raise WireError("envelope is nested too deeply") from None
    except ValueError:  # bad strings, NaN
        raise WireError("envelope is not JSON") from None
    for name in ("event_type", "event_id"):
        if not members.get(name):
            raise WireError(f"{name} is missing or empty")
    for name, limit in _LENGTHS.items():
        if len(members.get(name, "")) > limit:
            raise WireError(f"{name} has more than {limit} characters")
    issued_at = members.get("issued_at", "")
    try:
        issued = parse_nanoseconds(issued_at)
    except ValueError as exc:
        raise WireError(f"issued_at {exc}") from None
    return Envelope(
        members["event_type"],
        members["event_id"],
        issued_at,
        None if issued is None else issued // 1000,
        members.get("nonce", ""),
        payload,
        _decode_signature(members.get("signature", "")),
    )


def _scan_members(text: str) -> tuple[dict[str, str], str]:
    """The text members, and the raw payload; StopIteration, ValueError or RecursionError when it is not JSON."""
    skip = _SPACE.match
    position = _end(skip(text))
    if text[position : position + 1] != "{":
        raise WireError("envelope is not an object")
    position = _end(skip(text, position + 1))
    members: dict[str, str] = {}
    seen: set[str] = set()
    payload = "null"
    more = text[position : position + 1] != "}"
    while more:
        if text[position : position + 1] != '"':
            raise StopIteration(position)
        name, position = _scan(text, position)
        position = _end(skip(text, position))
        if text[position : position + 1] != ":":
            raise StopIteration(position)
        start = _end(skip(text, position + 1))
        value, position = _scan(text, start)
        if name in seen:
            raise WireError("envelope names a member twice")
        seen.add(name)
        if name == "payload":
            payload = text[start:position]
        elif name in _TEXTS and value is not None:
            if text[start] != '"':  # numbers come out of the scan as text as well
                raise WireError(f"{name} is not a string")
            members[name] = value if value.isascii() else _SURROGATE.sub("\ufffd", value)
        position = _end(skip(text, position))
        more = text[position : position + 1] == ","
        if more:
            position = _end(skip(text, position + 1))
    if text[position : position + 1] != "}" or _end(skip(text, position + 1)) != len(text):
        raise StopIteration(position)
    return members, payload


def _end(match: re.Match[str] | None) -> int:
    return match.end() if match else 0


def _decode_signature(text: str) -> bytes | None:
    if not text:
        return b""
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        return None
    # one signature must have one text, or a relay could make two events of one
    is_canonical = base64.b64encode(raw).decode("ascii") == text
    return raw if len(raw) == _SIGNATURE_BYTES and is_canonical else None


def canonical_bytes(event_type: str, event_id: str, issued_at: str, nonce: str, payload: str) -> bytes:
    """What the signature covers (docs/contract/events.md §3.1). `issued_at` is a valid time stamp and `payload` valid
    JSON text.
    """
    return (
        f'{{"event_type":{_quote(event_type)},"event_id":{_quote(event_id)},"issued_at":"{signed_form(issued_at)}",'
        f'"nonce":{_quote(nonce)},"payload":{compact(payload)}}}'
    ).encode()


def _quote(text: str) -> str:
    if _TO_ESCAPE.search(text) is None:
        return f'"{text}"'
    return '"' + _TO_ESCAPE.sub(lambda match: _ESCAPES[match[0]], text) + '"'


def compact(payload: str) -> str:
    """Valid JSON text without insignificant white space, escaped for HTML as Go does, otherwise untouched."""
    if _TO_COMPACT.search(payload) is None:
        return payload
    for character, replacement in _COMPACT:
        payload = payload.replace(character, replacement)
    return _without_blanks(payload) if " " in payload else payload


def _without_blanks(text: str) -> str:
    """Blanks outside strings removed. All in a few calls, because payloads have up to 4 MiB and the loop waits."""
    # control characters cannot stand in valid JSON, so they can stand for the escapes that would mislead the split
    escaped = "\\" in text
    if escaped:
        text = text.replace("\\\\", "\x00").replace('\\"', "\x01")
    parts = text.split('"')  # outside, inside, outside, ...
    parts[::2] = "\x02".join(parts[::2]).replace(" ", "").split("\x02")
    text = '"'.join(parts)
    return text.replace("\x00", "\\\\").replace("\x01", '\\"') if escaped else text


def seal(key: SigningKey, *, event_type: str, event_id: str, issued_at: str, nonce: str, payload: str) -> str:
    """The data of a signed event, as the control plane would send it."""
    signed = canonical_bytes(event_type, event_id, issued_at, nonce, payload)
    signature = base64.b64encode(key.sign(signed).signature).decode("ascii")
    return f'{signed.decode()[:-1]},"signature":"{signature}"}}'


class Verifier:
    """Decides which events to believe; remembers nonces over reconnections and key changes, in memory only.

    `evicted` counts nonces given up before their time because there were too many.
    """

    def __init__(self, keys: SigningKeys | None = None) -> None:
        self._nonces: dict[str, _Nonce] = {}
        self._cleaned = float("-inf")
        self.evicted = 0
        self.replace_keys(keys)

    def replace_keys(self, keys: SigningKeys | None) -> None:
        """From now on only these count; None: no event is believed."""
        self._current = VerifyKey(keys.current) if keys else None
        self._previous = VerifyKey(keys.previous) if keys and keys.previous else None
        self._previous_until = keys.previous_until if keys else 0.0

    def forget_nonces(self) -> None:
        """For a new identity."""
        self._nonces.clear()

    def forget(self, verdict: Verdict) -> None:
        """For a verified event that could not be handed over: when it comes again it is no replay."""
        if verdict.outcome is Outcome.VERIFIED and verdict.envelope is not None:
            self._nonces.pop(verdict.envelope.nonce, None)

    def verify(self, data: str, *, now: float, monotonic: float) -> Verdict:
        """All checks of docs/contract/events.md §4 in their order; `now` is Unix time at receipt, both clocks are in
        seconds.
        """
        try:
            envelope = parse_envelope(data)
        except WireError as exc:
            return Verdict(Outcome.MALFORMED, reason=str(exc))
        outcome = self._judge(envelope, now)
        if outcome is not Outcome.VERIFIED:
            return Verdict(outcome, envelope)
        first = self._nonces.get(envelope.nonce)
        if first is not None:
            return Verdict(Outcome.REPLAYED, envelope, same_event=first.event_id == envelope.event_id)
        self._remember(envelope, now, monotonic)
        return Verdict(Outcome.VERIFIED, envelope)

    def _judge(self, envelope: Envelope, now: float) -> Outcome:
        if envelope.signature == b"":
            return Outcome.UNSIGNED
        if not envelope.nonce:
            return Outcome.NO_NONCE
        if envelope.issued is None:
            return Outcome.NO_TIMESTAMP
        # whole microseconds, so that exactly five minutes are five minutes
        age = round(now * _MICROSECONDS) - envelope.issued
        if age > FRESHNESS * _MICROSECONDS:
            return Outcome.STALE
        if -age > FRESHNESS * _MICROSECONDS:
            return Outcome.FUTURE
        if envelope.signature is None:
            return Outcome.BAD_SIGNATURE
        signed = canonical_bytes(
            envelope.event_type, envelope.event_id, envelope.issued_at, envelope.nonce, envelope.payload
        )
        if self._current is not None and _is_signed(self._current, signed, envelope.signature):
            return Outcome.VERIFIED
        if (
            self._previous is not None
            and now < self._previous_until
            and envelope.event_type != "signing_key_rotated"  # a retired key must not choose its successor
            and _is_signed(self._previous, signed, envelope.signature)
        ):
            return Outcome.VERIFIED
        return Outcome.BAD_SIGNATURE

    def _remember(self, envelope: Envelope, now: float, monotonic: float) -> None:
        if monotonic - self._cleaned >= _NONCE_CLEANING_INTERVAL:
            self._cleaned = monotonic
            self._nonces = {
                nonce: seen
                for nonce, seen in self._nonces.items()
                if monotonic - seen.received < NONCE_RETENTION or now <= seen.fresh_until
            }
        while len(self._nonces) >= NONCE_LIMIT:
            del self._nonces[next(iter(self._nonces))]
            self.evicted += 1
        issued = (envelope.issued or 0) / _MICROSECONDS
        self._nonces[envelope.nonce] = _Nonce(monotonic, issued + FRESHNESS, envelope.event_id)


def _is_signed(key: VerifyKey, signed: bytes, signature: bytes) -> bool:
    try:
        key.verify(signed, signature)
    except BadSignatureError:
        return False
    return True
