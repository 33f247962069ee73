"""Answers of WireGuard programs in user space, `plexd/linux/wireguard/uapi.py`: what was read can be told again."""

from __future__ import annotations

import contextlib
import os

from plexd.linux.wireguard import uapi
from tests.linux.devices import answer_with

WORDS = (
    b"private_key=", b"listen_port=", b"fwmark=", b"public_key=", b"preshared_key=", b"endpoint=", b"tx_bytes=",
    b"persistent_keepalive_interval=", b"last_handshake_time_sec=", b"last_handshake_time_nsec=", b"rx_bytes=",
    b"allowed_ip=", b"errno=", b"00" * 32, b"[2001:db8::7]:51820", b"10.99.0.7/32", b"\n\n",
)  # fmt: skip


def check(data: bytes) -> None:
    answer = data.decode("ascii", "replace")  # what is received is decoded so
    with contextlib.suppress(ValueError):
        os.strerror(uapi.errno_of(answer))
    try:
        device = uapi.read_device(answer)
    except ValueError:
        return
    told = answer_with(device)
    assert uapi.errno_of(told) == 0
    assert uapi.read_device(told) == device
