"""One audit record: from a datagram or a line of audit.log to fields (docs/contract/telemetry.md §5.2 and §5.4).

The kernel writes `key=value` pairs. What a program may choose freely (a file name, an argument) is quoted, or hex when
it holds a quote, a space or anything unprintable; so inside quotes nothing is escaped. User-space records carry a
second list of pairs in `msg='...'`, written by the program: the pairs around it come from the kernel and win.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, Self

from plexd.audit.types import FIRST_RECORD, type_name, type_number

HEADER_BYTES = 16  # of a netlink message
ENRICHED = "\x1d"  # auditd adds names it looked up behind this byte
MAX_ARGUMENTS, MAX_ARGUMENT_BYTES = 64, 4096
UNSET = "4294967295"  # an id that nobody has set

AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
FAMILIES = {AF_UNIX: "unix", AF_INET: "inet", AF_INET6: "inet6", 16: "netlink", 17: "packet", 40: "vsock"}


class Malformed(ValueError):
    """This is no audit record."""


class EventId(NamedTuple):
    """What the records of one event share; ordered as the kernel made them. `str` is the form of the records."""

    milliseconds: int  # Unix time
    serial: int

    def __str__(self) -> str:
        seconds, milliseconds = divmod(self.milliseconds, 1000)
        return f"{seconds}.{milliseconds:03d}:{self.serial}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises Malformed."""
        match = _ID.fullmatch(text)
        if match is None:
            raise Malformed(f"no event id: {text[:40]!r}")
        return cls._of(match)

    @classmethod
    def _of(cls, match: re.Match[str]) -> Self:
        return cls(int(match[1]) * 1000 + int(match[2]), int(match[3]))


class Record(NamedTuple):
    type: int
    event: EventId
    payload: str  # from `audit(` on, without what auditd added
    body: str  # the pairs in it

    @property
    def line(self) -> str:
        """As it stands in audit.log."""
        return f"type={type_name(self.type)} msg={self.payload}"


def parse_datagram(data: bytes) -> Record | None:
    """What the kernel multicast; None for anything but a record. Raises Malformed.

    The length in the header has been wrong in kernels, so the payload is whatever follows the header.
    """
    if len(data) < HEADER_BYTES:
        raise Malformed("shorter than a netlink header")
    (number,) = struct.unpack_from("=H", data, 4)
    if number < FIRST_RECORD:
        return None
    return _record(number, data[HEADER_BYTES:].decode("utf-8", "replace"))


def parse_line(line: str) -> Record | None:
    """A line of audit.log; None for an empty one. Raises Malformed."""
    if not line.strip():
        return None
    match = _LINE.match(line)
    number = type_number(match[1]) if match is not None else None
    if match is None or number is None:
        raise Malformed(f"no line of an audit log: {line[:40]!r}")
    return _record(number, line[match.end() :])


def _record(number: int, text: str) -> Record:
    payload = text.partition(ENRICHED)[0].replace("\0", "").rstrip()
    match = _STAMP.match(payload)
    if match is None:
        raise Malformed(f"no stamp of an audit record: {payload[:40]!r}")
    return Record(number, EventId._of(match), payload, payload[match.end() :])  # noqa: SLF001


def fields(record: Record) -> dict[str, str]:
    """The pairs of a record, decoded, without those that say nothing. Of a pair that comes twice the first counts."""
    found: dict[str, str] = {}
    outer, inner = _split_message(record.body)
    for key, value, is_bare in _pairs(outer):
        _add(found, key, value, is_bare=is_bare)
    if inner:
        before = len(found)
        for key, value, is_bare in _pairs(inner):
            _add(found, key, value, is_bare=is_bare)
        if len(found) == before:
            found.setdefault("msg", inner)
    return found


def arguments(records: Iterable[Record]) -> tuple[str, ...]:
    """The argument vector of a program, from the EXECVE records of one event; at most 64 of them and 4 KiB."""
    pieces: dict[int, dict[int, bytes]] = {}
    for record in records:
        for key, value, is_bare in _pairs(record.body):
            match = _ARGUMENT.fullmatch(key)
            if match is None or (is_bare and value in _ABSENT):
                continue
            pieces.setdefault(int(match[1]), {})[int(match[2] or 0)] = _bytes(value, is_bare=is_bare)
    vector = []
    room = MAX_ARGUMENT_BYTES
    for _, parts in sorted(pieces.items())[:MAX_ARGUMENTS]:
        argument = b"".join(part for _, part in sorted(parts.items()))
        vector.append(_text(argument[:room] if len(argument) <= room else _cut(argument, room)))
        room -= len(argument)
        if room <= 0:
            break
    return tuple(vector)


def socket_address(saddr: str) -> dict[str, str | int]:
    """`family`, and what there is of `addr`, `port` and `path`; {} for what is no address."""
    try:
        data = bytes.fromhex(saddr)
    except ValueError:
        return {}
    if len(data) < 2:
        return {}
    number = int.from_bytes(data[:2], sys.byteorder)
    found: dict[str, str | int] = {"family": FAMILIES.get(number, f"af_{number}")}
    if number == AF_INET and len(data) >= 8:
        found |= {"addr": str(IPv4Address(data[4:8])), "port": int.from_bytes(data[2:4], "big")}
    elif number == AF_INET6 and len(data) >= 24:
        found |= {"addr": str(IPv6Address(data[8:24])), "port": int.from_bytes(data[2:4], "big")}
    elif number == AF_UNIX and len(data) > 2:
        is_abstract = data[2] == 0
        name = data[3:] if is_abstract else data[2:].partition(b"\0")[0]
        if name:
            found["path"] = ("@" if is_abstract else "") + _text(name)
    return found


def integer(found: Mapping[str, str], key: str) -> int | None:
    """The number under `key`; None when there is none."""
    value = found.get(key, "")
    return int(value) if _INTEGER.fullmatch(value) else None


# pairs

_ID = re.compile(r"(\d{1,11})\.(\d{3}):(\d{1,20})", re.ASCII)
_STAMP = re.compile(rf"audit\({_ID.pattern}\):? ?", re.ASCII)
_LINE = re.compile(r"(?:node=\S+ )?type=(\S+) msg=(?=audit\()")
_PAIR = re.compile(r"""(?:^|(?<= ))([^ =]+)=(?:"([^"]*)"|'([^']*)'|([^ ]*))""")
_MESSAGE = re.compile(r"(?:^|(?<= ))msg='")
_ARGUMENT = re.compile(r"a(\d{1,6})(?:\[(\d{1,6})\])?", re.ASCII)
_HEX = re.compile(r"(?:[0-9A-F]{2})+")
_INTEGER = re.compile(r"-?\d{1,19}", re.ASCII)
_ABSENT = frozenset({"", "(null)", "(none)", "?"})
_IDS = frozenset({"uid", "auid", "ses", "gid", "euid", "suid", "fsuid", "egid", "sgid", "fsgid", "old-auid", "old-ses"})
_ENCODED = frozenset({"comm", "exe", "name", "cwd", "path", "proctitle", "cmd", "acct", "key", "data", "vm"})


def _split_message(body: str) -> tuple[str, str]:
    """What the kernel wrote, and what the program said, which may hold quotes itself."""
    match = _MESSAGE.search(body)
    if match is None:
        return body, ""
    end = body.rfind("'")
    return body[: match.start()], body[match.end() : end if end >= match.end() else len(body)]


def _pairs(text: str) -> Iterator[tuple[str, str, bool]]:
    """Key, value, and whether the value stood without quotes."""
    for match in _PAIR.finditer(text):
        bare = match[4]
        if bare is not None:
            yield match[1], bare, True
        else:
            yield match[1], match[2] if match[2] is not None else match[3], False


def _add(found: dict[str, str], key: str, value: str, *, is_bare: bool) -> None:
    if key in found:
        return
    if is_bare:
        if value in _ABSENT:
            return
        if value == UNSET and key in _IDS:
            return
        if key in _ENCODED and _HEX.fullmatch(value):
            value = _text(bytes.fromhex(value))
    if key == "key":  # several rules may have caught the event
        value = ",".join(part for part in value.replace("\x01", " ").split(" ") if part) if "\x01" in value else value
    if value:
        found[key] = value


def _bytes(value: str, *, is_bare: bool) -> bytes:
    return bytes.fromhex(value) if is_bare and _HEX.fullmatch(value) else value.encode("utf-8", "replace")


def _text(data: bytes) -> str:
    return data.replace(b"\0", b" ").decode("utf-8", "replace")


def _cut(data: bytes, size: int) -> bytes:
    """At most `size` bytes, no character split."""
    while size and data[size] & 0xC0 == 0x80:
        size -= 1
    return data[:size]
