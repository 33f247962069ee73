"""Events of the Linux kernel's audit as entries (docs/contract/telemetry.md §5.5 and §5.6).

An entry says who (`subject`) did what (`action`) to what (`object`), and how it ended (`result`). What the records do
not state is left out, never guessed.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Collection, Mapping
from functools import cached_property

from plexd.audit import types
from plexd.audit.entry import FAILURE, SUCCESS, UNKNOWN, Entry, Value
from plexd.audit.grouping import Event
from plexd.audit.records import Record, arguments, fields, integer, socket_address
from plexd.audit.syscalls import syscall_name
from plexd.audit.types import type_name
from plexd.wire.times import format_time

SOURCE = "auditd"
MAX_PATHS = 8
MAX_FIELDS = 32

Object = dict[str, Value]


def normalise(event: Event, hostname: str) -> Entry:
    """The event must hold a record."""
    view = _View(event)
    describe = _describer(view.primary.type)
    found, action, result = describe(view)
    return Entry(
        timestamp=format_time(event.id.milliseconds / 1000),
        source=SOURCE,
        event_type=type_name(view.primary.type),
        subject=_subject(view),
        object=found,
        action=action,
        result=result,
        hostname=hostname,
        raw="\n".join(record.line for record in event.records),
    )


def without(event: Event, excluded: Collection[int]) -> Event | None:
    """The event without records of these types; None when nothing is left of it."""
    if not any(record.type in excluded for record in event.records):
        return event
    kept = tuple(record for record in event.records if record.type not in excluded)
    return event._replace(records=kept) if kept else None


def is_own(event: Event, pid: int, data_dir: str) -> bool:
    """Whether the event is about the process `pid` at work in its own data directory.

    A watch on that directory would otherwise make an event of the writing down of each event.
    """
    if not any(record.type == types.PATH for record in event.records):
        return False
    view = _View(event)
    return integer(view.actor, "pid") == pid and all(
        path == data_dir or path.startswith(data_dir + "/") for _, path in view.named
    )


class _View:
    """The records of an event, each taken apart at most once."""

    def __init__(self, event: Event) -> None:
        self._event = event
        self.primary = primary(event.records)

    @cached_property
    def main(self) -> Mapping[str, str]:
        return fields(self.primary)

    @cached_property
    def syscall(self) -> Mapping[str, str]:
        return self.main if self.primary.type == types.SYSCALL else self.first(types.SYSCALL)

    @cached_property
    def actor(self) -> Mapping[str, str]:
        """Where the subject stands: the system call, and what it lacks, from the primary record."""
        return {**self.main, **self.syscall}

    @property
    def syscall_name(self) -> str | None:
        number = integer(self.syscall, "syscall")
        return None if number is None else syscall_name(self.syscall.get("arch", ""), number)

    def first(self, number: int) -> Mapping[str, str]:
        for record in self._event.records:
            if record.type == number:
                return fields(record)
        return {}

    @cached_property
    def named(self) -> list[tuple[str, str]]:
        """Kind and path of every PATH record that has a name, by item."""
        directory = self.first(types.CWD).get("cwd", "")
        found = []
        for record in self._event.records:
            if record.type == types.PATH and "name" in (item := fields(record)):
                path = posixpath.join(directory, item["name"])
                found.append((integer(item, "item") or 0, item.get("nametype", "UNKNOWN"), path))
        found.sort(key=lambda item: item[0])
        return [(kind, path) for _, kind, path in found]

    @property
    def path(self) -> str | None:
        """The one that was acted on."""
        best = None
        for kind, path in self.named:
            rank = _KINDS.get(kind, _KINDS["UNKNOWN"])
            if best is None or rank <= best[0]:
                best = (rank, path)
        return best[1] if best is not None else None

    @property
    def paths(self) -> list[str]:
        return list(dict.fromkeys(path for _, path in self.named))[:MAX_PATHS]

    @property
    def arguments(self) -> tuple[str, ...]:
        return arguments(record for record in self._event.records if record.type == types.EXECVE)


_KINDS = {"CREATE": 0, "DELETE": 1, "NORMAL": 2, "UNKNOWN": 3, "PARENT": 4}

# the order of docs/contract/telemetry.md §5.5; a number stands for itself
_PRIMARY: tuple[range, ...] = (
    range(types.AVC, types.AVC + 1),
    range(types.SELINUX_ERR, types.SELINUX_ERR + 1),
    range(types.SECCOMP, types.SECCOMP + 1),
    range(1700, 1800),
    range(1800, 1900),
    range(types.CONFIG_CHANGE, types.CONFIG_CHANGE + 1),
    range(types.NETFILTER_CFG, types.NETFILTER_CFG + 1),
    range(types.KERN_MODULE, types.KERN_MODULE + 1),
    range(types.BPF, types.BPF + 1),
    range(types.SYSCALL, types.SYSCALL + 1),
)


def primary(records: Collection[Record]) -> Record:
    """The record that names the event."""

    def rank(record: Record) -> tuple[int, int]:
        for position, numbers in enumerate(_PRIMARY):
            if record.type in numbers:
                return position, 0
        return len(_PRIMARY) + (record.type in types.AUXILIARY), record.type

    return min(records, key=rank)


# who

_NUMBERS = ("uid", "gid", "euid", "auid", "pid", "ppid", "ses")
_TEXTS = ("comm", "exe", "tty", "acct", "addr", "terminal")
_SUBJECT = frozenset({*_NUMBERS, *_TEXTS, "subj"})


def _subject(view: _View) -> dict[str, Value]:
    actor = view.actor
    subject: dict[str, Value] = {}
    for key in _NUMBERS:
        _put(subject, key, integer(actor, key))
    for key in _TEXTS:
        _put(subject, key, actor.get(key))
    _put(subject, "context", actor.get("subj") or actor.get("scontext"))
    return subject


# what, and how it ended

Described = tuple[Object, str, str]

_RESULTS = {
    "yes": SUCCESS, "success": SUCCESS, "1": SUCCESS,
    "no": FAILURE, "failed": FAILURE, "fail": FAILURE, "0": FAILURE,
}  # fmt: skip


def _put(target: dict[str, Value], key: str, value: Value | None) -> None:
    if value is not None:
        target[key] = value


def _number(found: Mapping[str, str], key: str) -> int | str | None:
    """A number where it is one, else the text."""
    number = integer(found, key)
    return found.get(key) if number is None else number


def _pick(found: Mapping[str, str], *keys: str) -> Object:
    return {key: found[key] for key in keys if key in found}


def _outcome(found: Mapping[str, str]) -> str:
    return _RESULTS.get(found.get("res", ""), UNKNOWN)


def _syscall_outcome(view: _View) -> str:
    return _RESULTS.get(view.syscall.get("success", ""), UNKNOWN)


def _name(view: _View) -> str:
    return type_name(view.primary.type).lower()


def _operation(view: _View) -> str:
    return view.main.get("op") or _name(view)


def _remaining(view: _View, *taken: str) -> Object:
    """What stands neither in the subject nor in the result."""
    rest = [key for key in view.main if key not in _SUBJECT and key not in {"res", *taken}]
    return {key: view.main[key] for key in rest[:MAX_FIELDS]}


def _syscall(view: _View) -> Described:
    found: Object = {}
    _put(found, "path", view.path)
    if len(paths := view.paths) > 1:
        found["paths"] = paths
    if argv := view.arguments:
        found["argv"] = list(argv)
    _put(found, "proctitle", view.first(types.PROCTITLE).get("proctitle"))
    for key, value in socket_address(view.first(types.SOCKADDR).get("saddr", "")).items():
        found.setdefault(key, value)  # a path of its own is the better one
    _put(found, "key", view.syscall.get("key"))
    _put(found, "exit", integer(view.syscall, "exit"))
    _put(found, "target_pid", integer(view.first(types.OBJ_PID), "opid"))
    return found, view.syscall_name or "syscall", _syscall_outcome(view)


def _avc(view: _View) -> Described:
    return _apparmor(view) if "apparmor" in view.main else _selinux(view)


_PERMISSIONS = re.compile(r"avc:\s+(denied|granted)\s+\{([^}]*)\}")


def _selinux(view: _View) -> Described:
    main = view.main
    match = _PERMISSIONS.search(view.primary.body)
    verdict, permissions = (match[1], match[2].split()) if match is not None else ("", [])
    found: Object = {}
    _put(found, "path", main.get("path") or view.path or main.get("name"))
    found |= _pick(main, "tclass", "tcontext")
    _put(found, "syscall", view.syscall_name)
    permissive = main.get("permissive")
    if permissive in {"0", "1"}:
        found["permissive"] = permissive == "1"
    result = UNKNOWN
    if verdict:
        result = FAILURE if verdict == "denied" and permissive != "1" else SUCCESS
    return found, ",".join(permissions) or _name(view), result


def _apparmor(view: _View) -> Described:
    main = view.main
    found: Object = {}
    _put(found, "path", main.get("name"))
    found |= _pick(main, "profile", "operation", "denied_mask")
    result = {"DENIED": FAILURE, "ALLOWED": SUCCESS, "AUDIT": SUCCESS}.get(main["apparmor"], UNKNOWN)
    return found, main.get("operation") or _name(view), result


def _user(view: _View) -> Described:
    found = _pick(view.main, "acct", "addr", "hostname", "terminal", "grantors")
    return found, _operation(view), _outcome(view.main)


def _account(view: _View) -> Described:
    found = _pick(view.main, "acct")
    if not found:
        _put(found, "id", _number(view.main, "id"))
    found |= _pick(view.main, "grp")
    return found, _operation(view), _outcome(view.main)


def _command(view: _View) -> Described:
    found: Object = {}
    _put(found, "command", view.main.get("cmd"))
    return found | _pick(view.main, "cwd", "terminal"), "command", _outcome(view.main)


def _service(action: str) -> Callable[[_View], Described]:
    return lambda view: (_pick(view.main, "unit"), action, _outcome(view.main))


def _system(view: _View) -> Described:
    return _remaining(view), _name(view), _outcome(view.main)


def _login(view: _View) -> Described:
    found: Object = {}
    for key in ("old_auid", "old_ses"):
        _put(found, key, integer(view.main, key.replace("_", "-")))
    return found, "set_loginuid", _outcome(view.main)


def _config_change(view: _View) -> Described:
    found = _pick(view.main, "op", "key")
    _put(found, "list", _number(view.main, "list"))
    return found | _remaining(view, *found), _operation(view), _outcome(view.main)


def _netfilter(view: _View) -> Described:
    found = _pick(view.main, "table")
    for key in ("family", "entries"):
        _put(found, key, _number(view.main, key))
    return found, _operation(view), _outcome(view.main)


def _kernel_module(view: _View) -> Described:
    return _pick(view.main, "name"), view.syscall_name or _name(view), _syscall_outcome(view)


def _seccomp(view: _View) -> Described:
    found: Object = {}
    number = integer(view.main, "syscall")
    if number is not None:
        found["syscall"] = syscall_name(view.main.get("arch", ""), number)
    found |= _pick(view.main, "code")
    _put(found, "sig", _number(view.main, "sig"))
    return found, "seccomp", FAILURE


def _abnormal_end(view: _View) -> Described:
    found = _pick(view.main, "exe")
    _put(found, "sig", _number(view.main, "sig"))
    return found, "abend", FAILURE


def _promiscuous(view: _View) -> Described:
    found = _pick(view.main, "dev")
    for key in ("prom", "old_prom"):
        _put(found, key, _number(view.main, key))
    return found, "promiscuous", UNKNOWN


def _integrity(view: _View) -> Described:
    return _pick(view.main, "op", "cause", "name"), _operation(view), _outcome(view.main)


def _anything(view: _View) -> Described:
    found: Object = dict(list(view.main.items())[:MAX_FIELDS])
    stated = view.syscall.get("success") or view.main.get("success") or view.main.get("res", "")
    return found, _name(view), _RESULTS.get(stated, UNKNOWN)


_DESCRIBERS: dict[int, Callable[[_View], Described]] = {
    types.SYSCALL: _syscall,
    types.AVC: _avc,
    **dict.fromkeys([1100, 1101, 1102, 1103, 1104, 1105, 1106, 1108, 1110, 1112, 1113], _user),
    **dict.fromkeys([1114, 1115, 1116, 1117, 1132, 1135, 1136], _account),
    1123: _command,
    1130: _service("start"),
    1131: _service("stop"),
    **dict.fromkeys([1127, 1128, 1129], _system),
    types.LOGIN: _login,
    types.CONFIG_CHANGE: _config_change,
    types.NETFILTER_CFG: _netfilter,
    types.KERN_MODULE: _kernel_module,
    types.SECCOMP: _seccomp,
    types.ANOM_PROMISCUOUS: _promiscuous,
    types.ANOM_ABEND: _abnormal_end,
    **dict.fromkeys(range(1800, 1900), _integrity),
}


def _describer(number: int) -> Callable[[_View], Described]:
    return _DESCRIBERS.get(number, _anything)
