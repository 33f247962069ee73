"""docs/control-plane.md: its event is believed, its answers are read, its calls are those of the contract."""

import base64
import json
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
from nacl.signing import SigningKey

from plexd.mesh.desired import SigningKeys
from plexd.wire import models
from plexd.wire.endpoints import ENDPOINTS
from plexd.wire.envelope import Outcome, Verdict, Verifier
from plexd.wire.reading import load, read_value
from plexd.wire.sse import Decoder, Event, Retry
from tests.documentation.pages import ROOT, blocks, rows, section

PAGE = ROOT / "docs" / "control-plane.md"
KEY = SigningKey(bytes(range(32)))
SignedEvent = Callable[[SigningKey, str, object], str]


@pytest.fixture
def signed_event() -> SignedEvent:
    """The function as it stands on the page."""
    (program,) = blocks(PAGE, "python")
    names: dict[str, Any] = {}
    exec(program, names)  # noqa: S102 - it is our own page
    return cast("SignedEvent", names["signed_event"])


def verify(data: str, key: SigningKey = KEY) -> Verdict:
    verifier = Verifier(SigningKeys(key.verify_key.encode()))
    return verifier.verify(data, now=time.time(), monotonic=0.0)


def test_the_function_on_the_page_has_at_most_ten_lines() -> None:
    (program,) = blocks(PAGE, "python")
    assert len([line for line in program.splitlines() if line]) <= 10


@pytest.mark.parametrize(
    "payload",
    [
        None,
        {"peer_id": "n_2"},
        {"key": 'a<b>&"c"\\ \u2028\u2029\x7f', "number": [1.0, 1e300, -0.0, 10**20], "text": "Käse \N{SNAKE}\t"},
        {"label": "\ud800", "nested": [{"a": [[], {}, ""]}]},
    ],
)
def test_its_event_is_verified_with_its_payload(signed_event: SignedEvent, payload: object) -> None:
    verdict = verify(signed_event(KEY, "peer_removed", payload))
    assert verdict.outcome is Outcome.VERIFIED
    assert verdict.envelope is not None
    assert verdict.envelope.event_type == "peer_removed"
    assert json.loads(verdict.envelope.payload) == payload


def test_its_event_travels_through_the_stream(signed_event: SignedEvent) -> None:
    data = signed_event(KEY, "policy_updated", {"note": "two\nlines"})
    assert Decoder().feed(f"data: {data}\n\n".encode()) == [Event(None, "", data)]


def test_another_key_or_a_changed_payload_is_refused(signed_event: SignedEvent) -> None:
    data = signed_event(KEY, "peer_removed", {"peer_id": "n_2"})
    assert verify(data, SigningKey(bytes(32))).outcome is Outcome.BAD_SIGNATURE
    assert verify(data.replace("n_2", "n_3")).outcome is Outcome.BAD_SIGNATURE


def test_two_events_have_nonces_and_ids_of_their_own(signed_event: SignedEvent) -> None:
    verifier = Verifier(SigningKeys(KEY.verify_key.encode()))
    for _ in range(2):
        data = signed_event(KEY, "policy_updated", None)
        assert verifier.verify(data, now=time.time(), monotonic=0.0).outcome is Outcome.VERIFIED


def test_the_public_key_is_told_as_the_page_says() -> None:
    expression = "base64.b64encode(key.verify_key.encode()).decode()"
    assert f"`{expression}`" in PAGE.read_text(encoding="utf-8")
    text = eval(expression, {"base64": base64, "key": KEY})  # noqa: S307 - it is our own page
    assert text == "A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg="  # docs/contract/events.md §3.2


@pytest.mark.parametrize(("number", "model"), [(0, models.RegisterResponse), (1, models.StateResponse)])
def test_the_answers_on_the_page_are_read_whole(number: int, model: type[models.Model]) -> None:
    document = cast("dict[str, Any]", load(blocks(PAGE, "json")[number].encode()))
    assert set(document) <= set(model.model_fields)
    _, skipped = read_value(model, document)
    assert skipped == ()


def test_the_stream_on_the_page_is_decoded() -> None:
    (stream,) = blocks(PAGE, "text")
    retry, event = Decoder().feed(stream.encode())
    assert retry == Retry(2.0)
    assert isinstance(event, Event)
    assert (event.id, json.loads(event.data)["event_type"]) == ("8841", "peer_removed")


def test_the_calls_on_the_page_are_those_of_the_contract() -> None:
    listed = [(cells[0], cells[1].strip("`")) for cells in rows(section(PAGE, "All calls"))]
    assert listed == [(endpoint.method, endpoint.template) for endpoint in ENDPOINTS]
