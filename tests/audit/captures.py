"""What a Debian 12 host said in a few seconds: as the kernel multicast it, and as auditd wrote it down."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from plexd.audit.grouping import Assembler, Event
from plexd.audit.records import Record, parse_datagram, parse_line

CAPTURED = Path(__file__).parent / "captured"


def datagram(number: int, payload: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), number, 0, 0, 0) + payload


def record(number: int, text: str) -> Record:
    found = parse_datagram(datagram(number, text.encode("utf-8", "surrogateescape")))
    assert found is not None
    return found


def multicast() -> list[Record]:
    lines = (CAPTURED / "multicast.txt").read_bytes().splitlines()
    found = [parse_datagram(datagram(int(line[:4]), line[5:])) for line in lines]
    return [record for record in found if record is not None]


def logged() -> list[Record]:
    # auditd puts byte 0x1D behind what the kernel said, which str.splitlines takes for the end of a line
    lines = (CAPTURED / "audit.log").read_text().split("\n")
    found = [parse_line(line) for line in lines]
    return [record for record in found if record is not None]


def events(records: Iterable[Record]) -> dict[str, Event]:
    assembler = Assembler()
    found = [event for record in records for event in assembler.add(record, now=0.0)]
    found += assembler.flush()
    return {str(event.id): event for event in found}
