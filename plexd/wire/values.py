"""Small values inside the documents: binary text, checksums, addresses, path segments, bearer credentials.

Errors are ValueErrors whose text continues a sentence ("is not ...") and never repeats the value.
"""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import quote

from plexd.mesh.address import Prefix, parse_ip

_CHECKSUM = re.compile(r"(?:[sS][hH][aA]256:)?([0-9a-fA-F]{64})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BEARER = re.compile(r"[\x21-\x7e]{1,512}")
MAX_SEGMENT_BYTES = 256


def decode_base64(text: str, length: int) -> bytes:
    """Exactly `length` bytes from canonical standard base64 with padding."""
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ValueError("is not standard base64") from None
    if len(raw) != length:
        raise ValueError(f"has {len(raw)} bytes instead of {length}")
    if base64.b64encode(raw).decode("ascii") != text:
        raise ValueError("is not canonical base64")
    return raw


def parse_checksum(text: str) -> str:
    """The written form, `sha256:` and 64 lower-case digits; read with or without the prefix, in any letter case."""
    match = _CHECKSUM.fullmatch(text)
    if match is None:
        raise ValueError("is not a SHA-256 checksum")
    return f"sha256:{match[1].lower()}"


def parse_mesh_ip(text: str) -> bytes:
    """Packed address; a prefix length is tolerated and cut."""
    address, slash, _ = text.partition("/")
    try:
        if slash:
            Prefix.parse(text)
        return parse_ip(address)
    except ValueError:
        raise ValueError("is not an IP address") from None


def path_segment(text: str) -> str:
    """One segment of a URL path, percent-encoded (docs/contract/wire.md §1.4). Raises ValueError for illegal text."""
    if not text or text in {".", ".."} or _CONTROL.search(text):
        raise ValueError("is empty, a relative path or has control characters")
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not Unicode text") from None
    if len(raw) > MAX_SEGMENT_BYTES:
        raise ValueError(f"is longer than {MAX_SEGMENT_BYTES} bytes")
    return quote(raw, safe="")


def is_bearer(text: str) -> bool:
    """Whether the node key can stand in an Authorization header (docs/contract/wire.md §1.2)."""
    return _BEARER.fullmatch(text) is not None
