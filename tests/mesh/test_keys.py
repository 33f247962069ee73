"""Keys are read strictly, compare as bytes, and secret ones never print."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.mesh.keys import NO_PRESHARED_KEY, PresharedKey, PrivateKey, PublicKey


@given(st.binary(min_size=32, max_size=32))
def test_keys_survive_the_way_through_text(raw: bytes) -> None:
    assert PublicKey.parse(str(PublicKey(raw))) == raw
    assert PrivateKey.parse(PrivateKey(raw).reveal()) == raw
    assert hash(PublicKey(raw)) == hash(raw)


def test_public_key_is_that_of_rfc_7748() -> None:
    """Section 5.2, the iterated vector after one step: scalar and coordinate are both 9."""
    scalar = PrivateKey(bytes([9]).ljust(32, b"\0"))
    assert scalar.public().hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"


def test_generated_keys_are_clamped_and_differ() -> None:
    keys = {PrivateKey.generate() for _ in range(50)}
    assert len(keys) == 50
    assert all(key[0] & 7 == 0 and key[31] & 0xC0 == 0x40 for key in keys)


GOOD = base64.b64encode(bytes(range(32))).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        GOOD[:-1],
        GOOD[:-2],
        GOOD + "\n",
        f" {GOOD}",
        base64.b64encode(bytes(31)).decode(),
        base64.b64encode(bytes(33)).decode(),
        base64.urlsafe_b64encode(bytes([0xFB] * 32)).decode(),
        f"{GOOD[:-2]}9=",  # trailing bits that stand for nothing
        "é" * 44,
        GOOD.encode().hex(),
    ],
)
def test_loose_keys_are_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(ValueError, match=r"base64|bytes") as caught:
        PrivateKey.parse(text)
    assert not text or text not in str(caught.value)


@pytest.mark.parametrize("kind", [PrivateKey, PresharedKey])
def test_secret_keys_never_print(kind: type[PrivateKey | PresharedKey]) -> None:
    raw = bytes(range(65, 97))
    key = kind(raw)
    for said in (str(key), repr(key), f"{key}", f"{key!r}", str([key]), str({"key": key})):
        assert said.count("********") == 1
        assert base64.b64encode(raw).decode() not in said
        assert raw.decode() not in said


def test_public_key_is_told_apart_by_eight_characters() -> None:
    assert PublicKey(bytes([1] * 32)).short == "AQEBAQEB"
    assert repr(PublicKey(bytes([1] * 32))) == "PublicKey(AQEBAQEB)"


def test_no_preshared_key_is_what_the_kernel_shows() -> None:
    assert bytes(32) == NO_PRESHARED_KEY
