"""WireGuard keys as types. Bytes inside, so that they compare and hash as fast as bytes; secret ones never print."""

from __future__ import annotations

import base64
import binascii
import os
from typing import Self

from nacl.bindings import crypto_scalarmult_base

KEY_BYTES = 32


def decode_key(text: str) -> bytes:
    """32 bytes from canonical standard base64 with padding; ValueError otherwise, without the text in it."""
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ValueError("not standard base64") from None
    if len(raw) != KEY_BYTES:
        raise ValueError(f"{len(raw)} bytes instead of {KEY_BYTES}")
    # b64decode accepts any trailing bits; only one text stands for a key
    if base64.b64encode(raw).decode("ascii") != text:
        raise ValueError("base64 is not canonical")
    return raw


class PublicKey(bytes):
    """A Curve25519 public key; prints as base64."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(decode_key(text))

    def __str__(self) -> str:
        return base64.b64encode(self).decode("ascii")

    def __repr__(self) -> str:
        return f"PublicKey({self.short})"

    @property
    def short(self) -> str:
        """The first 8 characters, enough to tell keys apart in a log."""
        return str(self)[:8]


class _SecretKey(bytes):
    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(decode_key(text))

    def reveal(self) -> str:
        """The base64 text, for the file or the socket that needs it; never for a log."""
        return base64.b64encode(self).decode("ascii")

    def __str__(self) -> str:
        return "********"

    def __repr__(self) -> str:
        return f"{type(self).__name__}(********)"


class PresharedKey(_SecretKey):
    """A preshared key. `NO_PRESHARED_KEY` (32 zero bytes) is how the kernel spells "none"."""

    __slots__ = ()


class PrivateKey(_SecretKey):
    """A clamped Curve25519 private key."""

    __slots__ = ()

    @classmethod
    def generate(cls) -> Self:
        raw = bytearray(os.urandom(KEY_BYTES))
        raw[0] &= 248
        raw[31] = (raw[31] & 127) | 64
        return cls(raw)

    def public(self) -> PublicKey:
        return PublicKey(crypto_scalarmult_base(bytes(self)))


NO_PRESHARED_KEY = PresharedKey(bytes(KEY_BYTES))
