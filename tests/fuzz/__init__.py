"""Parsers against any bytes: each module here but the runners is a target, and its `check` says what must hold.

`check` takes bytes and fails when a parser raises an error that it does not announce, or when what it made of the
bytes is not right. `make fuzz` looks for bytes that make it fail; `test_corpus` replays those under `corpus/`, which
need no fuzzer: seeds, what reached new code, and (by name) what once failed.
"""

TARGETS = (
    "event_stream",
    "signed_envelope",
    "stun_message",
    "wireguard_dump",
    "rtnetlink",
    "uapi_answer",
    "config_file",
)
