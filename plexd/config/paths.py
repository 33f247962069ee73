"""Paths and addresses as they may be configured."""

from __future__ import annotations

import os
from pathlib import Path

from plexd.mesh.address import HostPort, format_ip, parse_endpoint

DEFAULT_SOCKET = Path("/var/run/plexd/api.sock")
MAX_SOCKET_BYTES = 107  # what fits into a sockaddr_un with its final zero byte


def absolute_path(value: str | Path) -> Path:
    """ValueError, worded as the end of "<key> ...", when it is none."""
    text = str(value)
    if not text.startswith("/"):
        raise ValueError("must be an absolute path")
    if not text.isprintable():
        raise ValueError("must not contain control characters")
    return Path(os.path.normpath(text))


def socket_path(value: str | Path) -> Path:
    """ValueError like `absolute_path`, also when no socket can be bound there."""
    path = absolute_path(value)
    if len(os.fsencode(path)) > MAX_SOCKET_BYTES:
        raise ValueError(f"must have at most {MAX_SOCKET_BYTES} bytes")
    return path


def split_listen(text: str) -> tuple[str, int]:
    """Host and port to listen on. ValueError like `absolute_path` unless it is `host:port`."""
    try:
        parsed = parse_endpoint(text)
    except ValueError:
        raise ValueError("must be host:port, ip:port or [ipv6]:port") from None
    return (parsed.host if isinstance(parsed, HostPort) else format_ip(parsed.packed)), parsed.port
