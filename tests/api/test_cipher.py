"""AES-256-GCM, on processors with instructions for it and on others: both sides open the same, and refuse the same."""

from __future__ import annotations

import subprocess
import sys
from typing import NoReturn

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from nacl.bindings import crypto_aead_aes256gcm_decrypt
from nacl.exceptions import UnavailableError

from plexd.api import cipher

# test cases 13 and 14 of "The Galois/Counter Mode of Operation" (McGrew, Viega), then one with other bytes in it
VECTORS = [
    (bytes(32), bytes(12), "530f8afbc74536b9a963b4f1c4cb738b", b""),
    (bytes(32), bytes(12), "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919", bytes(16)),
    (
        bytes(range(0x40, 0x60)),
        bytes(range(0xA0, 0xAC)),
        "a7ee330acf9c5f9b0b0b5841fa535858733bbbf7d1e99bd07d38",
        "pa55-wörd".encode(),
    ),
]


def is_without_instructions(*_: object) -> NoReturn:
    raise UnavailableError("Construction requires hardware acceleration")


def has_instructions() -> bool:
    try:
        crypto_aead_aes256gcm_decrypt(bytes.fromhex(VECTORS[0][2]), None, bytes(12), bytes(32))
    except UnavailableError:
        return False
    return True


@pytest.fixture(autouse=True, params=["as it is", "without"])
def _processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the instructions that it has, and without any for AES."""
    if request.param == "without":
        monkeypatch.setattr(cipher, "crypto_aead_aes256gcm_decrypt", is_without_instructions)


@pytest.mark.parametrize(("key", "nonce", "sealed", "plaintext"), VECTORS)
def test_what_was_sealed_elsewhere_opens(key: bytes, nonce: bytes, sealed: str, plaintext: bytes) -> None:
    assert cipher.open_sealed(key, nonce, bytes.fromhex(sealed)) == plaintext


@pytest.mark.parametrize(("key", "nonce", "sealed"), [row[:3] for row in VECTORS])
def test_no_flipped_bit_goes_unnoticed(key: bytes, nonce: bytes, sealed: str) -> None:
    given_ = (key, nonce, bytes.fromhex(sealed))
    for which, value in enumerate(given_):
        for position in range(len(value)):
            damaged = bytearray(value)
            damaged[position] ^= 1
            parts = [*given_[:which], bytes(damaged), *given_[which + 1 :]]
            with pytest.raises(ValueError, match="the tag does not fit"):
                cipher.open_sealed(*parts)


@pytest.mark.parametrize("length", range(16))
def test_less_than_a_tag_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="wrong length"):
        cipher.open_sealed(bytes(32), bytes(12), bytes(length))


@pytest.mark.parametrize("length", [0, 8, 11, 13, 16])
def test_nonce_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="wrong length"):
        cipher.open_sealed(bytes(32), bytes(length), bytes(32))


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=12, max_size=12), st.binary(max_size=5_000))
def test_whatever_openssl_seals_opens(key: bytes, nonce: bytes, plaintext: bytes) -> None:
    assert cipher.open_sealed(key, nonce, AESGCM(key).encrypt(nonce, plaintext, None)) == plaintext


@pytest.mark.skipif(not has_instructions(), reason="this processor has no instructions for AES")
def test_node_does_not_pay_for_openssl_twice() -> None:
    """Python brings one for TLS; what `cryptography` brings is another."""
    program = (
        "import sys, plexd.daemon; from plexd.api.cipher import open_sealed;"
        f"open_sealed(bytes(32), bytes(12), bytes.fromhex({VECTORS[0][2]!r})); print('cryptography' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert said == "False\n"
