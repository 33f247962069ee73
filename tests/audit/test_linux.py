"""Linux events as entries: the table of the contract line by line, and the captured ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.audit import types
from plexd.audit.entry import Entry
from plexd.audit.grouping import Event
from plexd.audit.linux import is_own, normalise, primary, without
from plexd.audit.records import EventId, Record
from tests.audit.captures import events, multicast

HOST = "edge-03"
SYSCALL = (
    "arch=c000003e syscall=257 success=no exit=-13 ppid=7700 pid=7712 auid=1001 uid=1001 gid=1001 euid=1001 "
    'tty=pts0 ses=41 comm="cat" exe="/usr/bin/cat" subj=unconfined key="shadow-watch"'
)


def event(*records: tuple[int, str]) -> Event:
    stamp = EventId(1772615707431, 8841)
    return Event(stamp, tuple(Record(n, stamp, f"audit({stamp}): {body}", body) for n, body in records))


def entry(*records: tuple[int, str]) -> Entry:
    return normalise(event(*records), HOST)


def told(*records: tuple[int, str]) -> tuple[dict[str, Any], str, str]:
    made = entry(*records)
    return dict(made.object), made.action, made.result


def test_the_example_of_the_contract() -> None:
    made = entry(
        (types.SYSCALL, SYSCALL),
        (types.CWD, 'cwd="/home/ops"'),
        (types.PATH, 'item=0 name="/etc/shadow" nametype=NORMAL'),
    )
    assert made._asdict() == {
        "timestamp": "2026-03-04T09:15:07.431Z",
        "source": "auditd",
        "event_type": "SYSCALL",
        "subject": {
            "uid": 1001, "gid": 1001, "euid": 1001, "auid": 1001, "pid": 7712, "ppid": 7700, "ses": 41,
            "comm": "cat", "exe": "/usr/bin/cat", "tty": "pts0", "context": "unconfined",
        },
        "object": {"path": "/etc/shadow", "key": "shadow-watch", "exit": -13},
        "action": "openat",
        "result": "failure",
        "hostname": HOST,
        "raw": f"type=SYSCALL msg=audit(1772615707.431:8841): {SYSCALL}\n"
        'type=CWD msg=audit(1772615707.431:8841): cwd="/home/ops"\n'
        'type=PATH msg=audit(1772615707.431:8841): item=0 name="/etc/shadow" nametype=NORMAL',
    }  # fmt: skip


SELINUX = (
    'avc:  denied  { read write } for  pid=7 comm="httpd" path="/var/x" scontext=a:b:c:s0 '
    "tcontext=a:b:shadow_t:s0 tclass=file permissive=0"
)
APPARMOR = (
    'apparmor="DENIED" operation="open" profile="/usr/sbin/cupsd" name="/etc/shadow" pid=7 '
    'comm="cupsd" requested_mask="r" denied_mask="r" fsuid=0 ouid=0'
)
USER = "pid=7 uid=0 auid=1001 ses=3 msg='op={op} {inner} res={res}'"


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (
            [(types.AVC, SELINUX), (types.SYSCALL, SYSCALL)],
            ({"path": "/var/x", "tclass": "file", "tcontext": "a:b:shadow_t:s0", "syscall": "openat",
              "permissive": False}, "read,write", "failure"),
        ),
        (
            [(types.AVC, "avc:  denied  { execmem } for  pid=7 tclass=process permissive=1")],
            ({"tclass": "process", "permissive": True}, "execmem", "success"),
        ),
        (
            [(types.AVC, "avc:  granted  { setsecparam } for  pid=7 tclass=security")],
            ({"tclass": "security"}, "setsecparam", "success"),
        ),
        (
            [(types.AVC, APPARMOR)],
            ({"path": "/etc/shadow", "profile": "/usr/sbin/cupsd", "operation": "open", "denied_mask": "r"},
             "open", "failure"),
        ),
        (
            [(types.AVC, 'apparmor="ALLOWED" operation="exec" profile="x"')],
            ({"profile": "x", "operation": "exec"}, "exec", "success"),
        ),
        (
            [(types.AVC, 'apparmor="STATUS" operation="profile_load" profile="unconfined" name="x"')],
            ({"path": "x", "profile": "unconfined", "operation": "profile_load"}, "profile_load", "unknown"),
        ),
        (
            [(1112, USER.format(op="login", inner='acct="ops" exe="/usr/sbin/sshd" hostname=192.0.2.14 '
                                 "addr=192.0.2.14 terminal=ssh", res="failed"))],
            ({"acct": "ops", "addr": "192.0.2.14", "hostname": "192.0.2.14", "terminal": "ssh"}, "login", "failure"),
        ),
        (
            [(1101, USER.format(op="PAM:accounting", inner='grantors=pam_unix,pam_permit acct="ops"', res="success"))],
            ({"acct": "ops", "grantors": "pam_unix,pam_permit"}, "PAM:accounting", "success"),
        ),
        ([(1113, "pid=7 uid=0 msg='id=1001 res=1'")], ({}, "user_logout", "success")),
        (
            [(1114, USER.format(op="add-user", inner='id=1002 exe="/usr/sbin/useradd"', res="success"))],
            ({"id": 1002}, "add-user", "success"),
        ),
        (
            [(1132, USER.format(op="add-user-to-group", inner='grp="wheel" acct="ops"', res="0"))],
            ({"acct": "ops", "grp": "wheel"}, "add-user-to-group", "failure"),
        ),
        (
            [(1123, "pid=7 uid=1001 msg='cwd=\"/home/ops\" cmd=6C73202F726F6F74 terminal=pts/0 res=success'")],
            ({"command": "ls /root", "cwd": "/home/ops", "terminal": "pts/0"}, "command", "success"),
        ),
        (
            [(1130, "pid=1 uid=0 msg='unit=nginx comm=\"systemd\" exe=\"/lib/systemd/systemd\" res=success'")],
            ({"unit": "nginx"}, "start", "success"),
        ),
        ([(1131, "pid=1 uid=0 msg='unit=nginx res=failed'")], ({"unit": "nginx"}, "stop", "failure")),
        (
            [(1129, "pid=1 uid=0 msg='old-level=N new-level=5 comm=\"systemd-update-utmp\" res=success'")],
            ({"old-level": "N", "new-level": "5"}, "system_runlevel", "success"),
        ),
        (
            [(types.LOGIN, "pid=7 uid=0 old-auid=4294967295 auid=1001 tty=(none) old-ses=2 ses=41 res=1")],
            ({"old_ses": 2}, "set_loginuid", "success"),
        ),
        (
            [(types.CONFIG_CHANGE, 'auid=0 ses=1 op=add_rule key="watch" list=4 res=1'), (types.SYSCALL, SYSCALL)],
            ({"op": "add_rule", "key": "watch", "list": 4}, "add_rule", "success"),
        ),
        (
            [(types.CONFIG_CHANGE, "audit_enabled=0 old=1 auid=0 ses=1 res=1")],
            ({"audit_enabled": "0", "old": "1"}, "config_change", "success"),
        ),
        (
            [(types.SYSCALL, SYSCALL), (types.NETFILTER_CFG, "table=inet:3 family=1 entries=12 op=nft_register_rule")],
            ({"table": "inet:3", "family": 1, "entries": 12}, "nft_register_rule", "unknown"),
        ),
        (
            [(types.KERN_MODULE, 'name="wireguard"'),
             (types.SYSCALL, "arch=c000003e syscall=313 success=yes exit=0")],
            ({"name": "wireguard"}, "finit_module", "success"),
        ),
        ([(types.KERN_MODULE, 'name="wireguard"')], ({"name": "wireguard"}, "kern_module", "unknown")),
        (
            [(types.SECCOMP, 'auid=1 pid=7 comm="x" sig=31 arch=c00000b7 syscall=56 ip=0x7 code=0x80000000')],
            ({"syscall": "openat", "code": "0x80000000", "sig": 31}, "seccomp", "failure"),
        ),
        (
            [(types.ANOM_ABEND, 'uid=0 pid=7 comm="a" exe="/bin/a" sig=6 res=1')],
            ({"exe": "/bin/a", "sig": 6}, "abend", "failure"),
        ),
        (
            [(types.ANOM_PROMISCUOUS, "dev=eth0 prom=256 old_prom=0 auid=0 uid=0"), (types.SYSCALL, SYSCALL)],
            ({"dev": "eth0", "prom": 256, "old_prom": 0}, "promiscuous", "unknown"),
        ),
        (
            [(1800, 'pid=7 uid=0 op=appraise_data cause=missing-hash comm="a" name="/bin/a" dev="sda" ino=4 res=0')],
            ({"op": "appraise_data", "cause": "missing-hash", "name": "/bin/a"}, "appraise_data", "failure"),
        ),
        (
            [(types.BPF, "prog-id=12 op=LOAD"), (types.SYSCALL, SYSCALL)],
            ({"prog-id": "12", "op": "LOAD"}, "bpf", "failure"),
        ),
        ([(1335, "pid=7 uid=0 nl-mcgrp=1 op=connect res=1")],
         ({"pid": "7", "uid": "0", "nl-mcgrp": "1", "op": "connect", "res": "1"}, "event_listener", "success")),
        ([(1399, "x=1")], ({"x": "1"}, "unknown[1399]", "unknown")),
        (
            [(types.SYSCALL, "arch=c000003e syscall=62 success=yes exit=0"),
             (types.OBJ_PID, 'opid=99 oauid=0 ouid=0 oses=1 ocomm="x"'), (types.PROCTITLE, "proctitle=6B696C6C003939")],
            ({"proctitle": "kill 99", "exit": 0, "target_pid": 99}, "kill", "success"),
        ),
        (
            [(types.SYSCALL, "arch=c000003e syscall=59 exit=0"), (types.EXECVE, 'argc=2 a0="ls" a1="/"')],
            ({"argv": ["ls", "/"], "exit": 0}, "execve", "unknown"),
        ),
    ],
)  # fmt: skip
def test_each_kind_of_event(records: list[tuple[int, str]], expected: tuple[dict[str, Any], str, str]) -> None:
    assert told(*records) == expected


@pytest.mark.parametrize(
    ("items", "path"),
    [
        (["NORMAL /a", "PARENT /"], "/a"),
        (["PARENT /d", "PARENT /e", "DELETE /d/old", "CREATE /e/new"], "/e/new"),
        (["NORMAL /a", "NORMAL /b"], "/b"),
        (["PARENT /d", "UNKNOWN /d/x"], "/d/x"),
        (["PARENT /d", "DELETE /d/x"], "/d/x"),
        (["NORMAL relative"], "/home/relative"),
    ],
)
def test_the_path_that_was_acted_on(items: list[str], path: str) -> None:
    records = [
        (types.PATH, f'item={n} name="{name}" nametype={kind}')
        for n, (kind, name) in enumerate(item.split() for item in items)
    ]
    found = told((types.SYSCALL, SYSCALL), (types.CWD, 'cwd="/home"'), *reversed(records))[0]
    assert found["path"] == path
    assert ("paths" in found) == (len(items) > 1)


def test_of_many_paths_eight_are_kept() -> None:
    records = [(types.PATH, f'item={n} name="/{n}"') for n in range(12)]
    assert told((types.SYSCALL, SYSCALL), *records)[0]["paths"] == [f"/{n}" for n in range(8)]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([1300, 1302, 1307, 1327], 1300),
        ([1300, 1334], 1334),
        ([1300, 1305], 1305),
        ([1305, 1325, 1300], 1305),
        ([1326, 1300, 1400], 1400),
        ([1300, 1401, 1326], 1401),
        ([1326, 1701], 1326),
        ([1801, 1701], 1701),
        ([1300, 1801], 1801),
        ([1330, 1300], 1330),
        ([1336, 1331, 1302], 1331),
        ([1302, 1307], 1302),
        ([1327], 1327),
    ],
)
def test_the_record_that_names_the_event(numbers: list[int], expected: int) -> None:
    assert primary(event(*((number, "") for number in numbers)).records).type == expected


def test_excluded_records_leave_the_event() -> None:
    keystrokes = event((types.SYSCALL, SYSCALL), (types.TTY, "data=70617373"))
    kept = without(keystrokes, {types.TTY, 1124})
    assert kept is not None
    assert [record.type for record in kept.records] == [types.SYSCALL]
    assert without(event((1124, "data=70617373")), {types.TTY, 1124}) is None
    assert without(keystrokes, set()) is keystrokes


@pytest.mark.parametrize(
    ("paths", "pid", "expected"),
    [
        (["/var/lib/plexd", "/var/lib/plexd/telemetry/x"], 7712, True),
        (["/var/lib/plexd/telemetry/x"], 7713, False),
        (["/var/lib/plexd/telemetry/x", "/etc/x"], 7712, False),
        (["/var/lib/plexd-other/x"], 7712, False),
        (["telemetry/x"], 7712, True),
        ([], 7712, False),
    ],
)
def test_the_agents_own_writing_is_known(paths: list[str], pid: int, expected: bool) -> None:
    records = [(types.PATH, f'item={n} name="{path}"') for n, path in enumerate(paths)]
    made = event((types.SYSCALL, SYSCALL), (types.CWD, 'cwd="/var/lib/plexd"'), *records)
    assert is_own(made, pid, "/var/lib/plexd") is expected


def test_what_a_host_really_said() -> None:
    made = {key: normalise(event, HOST) for key, event in events(multicast()).items()}
    by_serial = {key.rpartition(":")[2]: found for key, found in made.items()}
    rename, connect, logged_in = by_serial["12"], by_serial["61"], by_serial["172"]
    assert (rename.action, rename.object["path"]) == ("renameat", "/tmp/audit-scratch/watched/renamed")
    assert (connect.action, connect.result) == ("connect", "failure")
    assert {key: connect.object[key] for key in ("addr", "port", "family", "exit")} == {
        "addr": "127.0.0.1", "port": 9, "family": "inet", "exit": -111,
    }  # fmt: skip
    assert logged_in.event_type == "USER_AUTH"
    assert logged_in.object == {"acct": "nobody", "grantors": "pam_rootok"}
    assert by_serial["9"].object["path"] == "/tmp/audit-scratch/watched/with space é"
    assert all(found.raw.count("\n") + 1 == len(events(multicast())[key].records) for key, found in made.items())
    assert not any("4294967295" in str({**found.subject, **found.object}) for found in made.values())


RECORD = st.tuples(
    st.integers(1005, 2999).filter(lambda number: number != types.EOE) | st.sampled_from([1300, 1302, 1400, 1309]),
    st.text(max_size=80)
    | st.lists(
        st.tuples(
            st.sampled_from(["pid", "name", "item", "key", "syscall", "arch", "saddr", "res", "apparmor", "a0", "msg"]),
            st.text(st.characters(exclude_characters=" "), max_size=8),
        ).map("=".join)
    ).map(" ".join),
)


@given(st.lists(RECORD, min_size=1, max_size=8))
def test_every_event_becomes_an_entry(records: list[tuple[int, str]]) -> None:
    made = entry(*records)
    assert made.result in {"success", "failure", "unknown"}
    assert made.action
    assert made.event_type
    assert len(made.object) <= 40
    is_own(event(*records), 7, "/var/lib/plexd")
