"""Audit records taken apart, real ones and whatever else may come."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from plexd.audit import types
from plexd.audit.records import (
    EventId,
    Malformed,
    Record,
    arguments,
    fields,
    parse_datagram,
    parse_line,
    socket_address,
)
from plexd.audit.syscalls import syscall_name
from plexd.audit.types import type_name, type_number
from tests.audit.captures import datagram, logged, multicast, record

STAMP = "audit(1772615707.431:8841): "


def found(body: str, number: int = types.SYSCALL) -> dict[str, str]:
    return fields(record(number, STAMP + body))


def test_the_kernel_and_the_audit_daemon_tell_the_same() -> None:
    from_kernel = [(r.type, r.payload) for r in multicast() if r.type != types.EOE]
    assert from_kernel == [(r.type, r.payload) for r in logged()]  # auditd writes no EOE


def test_a_record_knows_its_event_and_its_line() -> None:
    taken = record(types.CWD, STAMP + 'cwd="/home/ops"\0')
    assert taken == Record(types.CWD, EventId(1772615707431, 8841), STAMP + 'cwd="/home/ops"', 'cwd="/home/ops"')
    assert taken.line == 'type=CWD msg=audit(1772615707.431:8841): cwd="/home/ops"'
    assert parse_line("node=edge-03 " + taken.line) == taken
    assert str(taken.event) == "1772615707.431:8841"
    assert EventId.parse("1772615707.431:8841") == taken.event


def test_what_auditd_adds_is_no_part_of_the_record() -> None:
    line = 'type=CWD msg=audit(1.000:2): cwd="/"\x1dUID="root"'
    assert parse_line(line) == Record(types.CWD, EventId(1000, 2), 'audit(1.000:2): cwd="/"', 'cwd="/"')


@pytest.mark.parametrize("number", [0, 2, 1000, 1004])
def test_answers_of_the_protocol_are_no_records(number: int) -> None:
    assert parse_datagram(datagram(number, b"\0" * 40)) is None


def test_the_length_in_the_header_is_not_relied_on() -> None:
    data = bytearray(datagram(types.CWD, b'audit(1.000:2): cwd="/"'))
    data[0:4] = bytes(4)
    taken = parse_datagram(bytes(data))
    assert taken is not None
    assert taken.body == 'cwd="/"'


@pytest.mark.parametrize("data", [b"", b"short", datagram(1300, b"nothing"), datagram(1300, b"audit(1.0:2): a=b")])
def test_a_datagram_that_is_none_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        parse_datagram(data)


@pytest.mark.parametrize("line", ["hello", "type=SYSCALL", "type=NONSENSE msg=audit(1.000:2): a=b", "type=CWD msg=cwd"])
def test_a_line_that_is_none_is_malformed(line: str) -> None:
    with pytest.raises(Malformed):
        parse_line(line)


def test_an_empty_line_says_nothing() -> None:
    assert parse_line("\n") is None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("a=1 b=two", {"a": "1", "b": "two"}),
        ('exe="/usr/bin/a b" x=1', {"exe": "/usr/bin/a b", "x": "1"}),
        ("exe='/usr/bin/a' x=1", {"exe": "/usr/bin/a", "x": "1"}),
        ("name=2F746D702F7820C3A9", {"name": "/tmp/x é"}),
        ('name="2F746D70"', {"name": "2F746D70"}),  # quoted, so it is called that
        ("name=2f746d70", {"name": "2f746d70"}),  # the kernel writes capitals
        ("name=2F7", {"name": "2F7"}),
        ("a0=2F74", {"a0": "2F74"}),  # a number: not one of the keys that are encoded
        ("proctitle=636174002F", {"proctitle": "cat /"}),
        ("name=FF41", {"name": "\ufffdA"}),
        ("key=(null) tty=(none) addr=? x=", {}),
        ('acct="?"', {"acct": "?"}),
        ("auid=4294967295 uid=0 ses=4294967295 exit=4294967295", {"uid": "0", "exit": "4294967295"}),
        ("key=6F6E650174776F", {"key": "one,two"}),
        ('key="one two"', {"key": "one two"}),
        ("x=1 x=2", {"x": "1"}),
        ('avc:  denied  { read } for  pid=7 comm="a"', {"pid": "7", "comm": "a"}),
        ("{ saddr_fam=inet }", {"saddr_fam": "inet"}),
        ("no pairs here", {}),
        ("=1 a=b", {"a": "b"}),
    ],
)
def test_pairs(body: str, expected: dict[str, str]) -> None:
    assert found(body) == expected


def test_what_a_program_says_does_not_win_over_what_the_kernel_says() -> None:
    body = "pid=7 uid=1000 msg='op=login uid=0 pid=1 acct=\"root\" res=success'"
    assert found(body, 1112) == {"pid": "7", "uid": "1000", "op": "login", "acct": "root", "res": "success"}


def test_a_message_may_hold_quotes_and_no_pairs() -> None:
    assert found("pid=7 msg='it's done'", types.USER) == {"pid": "7", "msg": "it's done"}


def test_arguments_come_in_pieces_and_several_records() -> None:
    records = [
        record(types.EXECVE, STAMP + 'argc=4 a0="/bin/echo" a1_len=18 a1[0]=2FC3'),
        record(types.EXECVE, STAMP + ' a1[1]=A92F a2=6120 a3=""'),
    ]
    assert arguments(records) == ("/bin/echo", "/é/", "a ", "")


def test_of_many_arguments_the_first_count() -> None:
    many = record(types.EXECVE, STAMP + " ".join(f'a{n}="x"' for n in range(100)))
    assert len(arguments([many])) == 64
    long = record(types.EXECVE, STAMP + 'a0="cmd" a1="' + "é" * 4000 + '" a2="y"')
    taken = arguments([long])
    assert taken[0] == "cmd"
    assert len(taken) == 2
    assert 4090 <= sum(len(argument.encode()) for argument in taken) <= 4096
    assert set(taken[1]) == {"é"}


@pytest.mark.parametrize(
    ("saddr", "expected"),
    [
        ("020000097F0000010000000000000000", {"family": "inet", "addr": "127.0.0.1", "port": 9}),
        (
            "0A000009000000000000000000000000000000000000000100000000",
            {"family": "inet6", "addr": "::1", "port": 9},
        ),
        ("01002F746D702F6E6F6E652E736F636B00", {"family": "unix", "path": "/tmp/none.sock"}),
        ("0100006162737472616374206E616D65", {"family": "unix", "path": "@abstract name"}),
        ("0100", {"family": "unix"}),
        ("100000000000000000000000", {"family": "netlink"}),
        ("0200", {"family": "inet"}),
        ("6300", {"family": "af_99"}),
        ("", {}),
        ("02", {}),
        ("zz", {}),
    ],
)
def test_socket_addresses(saddr: str, expected: dict[str, object]) -> None:
    assert socket_address(saddr) == expected


@pytest.mark.parametrize(
    ("arch", "number", "name"),
    [
        ("c000003e", 257, "openat"),
        ("c00000b7", 56, "openat"),
        ("40000003", 295, "openat"),
        ("40000028", 322, "openat"),
        ("c000003e", 437, "openat2"),
        ("40000028", 437, "openat2"),
        ("c000003e", 0, "read"),
        ("c000003e", 400, "syscall_400"),
        ("c0000015", 5, "syscall_5"),
        ("", -1, "syscall_-1"),
    ],
)
def test_system_calls_have_names(arch: str, number: int, name: str) -> None:
    assert syscall_name(arch, number) == name


@pytest.mark.parametrize(
    ("number", "name"),
    [(1005, "USER"), (1100, "USER_AUTH"), (1136, "ACCT_UNLOCK"), (1300, "SYSCALL"), (1309, "EXECVE"), (1320, "EOE"),
     (1327, "PROCTITLE"), (1334, "BPF"), (1400, "AVC"), (1701, "ANOM_ABEND"), (1806, "INTEGRITY_EVM_XATTR"),
     (2500, "VIRT_CONTROL"), (1301, "UNKNOWN[1301]"), (2999, "UNKNOWN[2999]")],
)  # fmt: skip
def test_record_types_have_names(number: int, name: str) -> None:
    assert type_name(number) == name
    assert type_number(name) == number


@given(st.binary(max_size=200), st.integers(0, 0xFFFF))
@example(b"audit(99999999999.999:99999999999999999999): x=\xff", 1300)
def test_whatever_is_multicast_is_a_record_or_malformed(payload: bytes, number: int) -> None:
    try:
        taken = parse_datagram(datagram(number, payload))
    except Malformed:
        return
    if taken is not None:
        fields(taken)
        arguments([taken])


@given(st.text(max_size=300))
def test_whatever_a_record_holds_can_be_taken_apart(body: str) -> None:
    taken = Record(1300, EventId(0, 0), STAMP + body, body)
    assert all("\0" not in value or "\0" in body for value in fields(taken).values())
    assert sum(len(argument.encode("utf-8", "replace")) for argument in arguments([taken])) <= 3 * 4096


@given(st.text(st.characters(exclude_characters='"\0', exclude_categories=["Cs"]), min_size=1))
def test_a_name_comes_out_as_it_went_in(name: str) -> None:
    assert found(f"name={name.encode().hex().upper()} x=1", types.PATH)["name"] == name


@given(st.text())
def test_an_address_that_is_none_is_no_trouble(saddr: str) -> None:
    socket_address(saddr)
