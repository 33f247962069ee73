"""One YAML text to one value for each key, with the line it stands on; every mistake is found.

The YAML is composed to nodes only, never constructed: nodes know their lines, and what a plain scalar was taken for.
YAML 1.1 reads `on` as a boolean and `60:30` as a number, so each scalar is checked against what its key wants.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import yaml

MAX_BYTES = 1 << 20
TAG = "tag:yaml.org,2002:"
READ_AS = {"bool": "a boolean", "int": "a number", "float": "a number", "timestamp": "a date", "null": "nothing"}
BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
DECIMAL = re.compile(r"-?(0|[1-9][0-9]{0,18})", re.ASCII)

Value = str | int | bool | dict[str, str] | tuple[str, ...]


class Size:
    """The kind of a number of bytes: a whole number, or a text such as 64KiB."""


class Auto:
    """The kind of a switch that can also be left to plexd: true, false or auto."""


Kind = (
    type[str]
    | type[int]
    | type[bool]
    | type[dict[str, str]]
    | type[tuple[str, ...]]
    | type[timedelta]
    | type[Size]
    | type[Auto]
)


@dataclass(frozen=True, slots=True)
class Problem:
    line: int
    key: str
    text: str


@dataclass(slots=True)
class Document:
    """`values` by dotted key; `lines` knows also sections and the entries of maps and lists."""

    values: dict[str, Value] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_document(raw: bytes, keys: Mapping[str, Kind]) -> Document:
    """What the bytes of a configuration file say about `keys`, which stand there with sections for their dots.

    What is wrong is in `problems`, and left out of `values`; names that are no key are wrong.
    """
    document = Document()
    if len(raw) > MAX_BYTES:
        document.problems.append(Problem(1, "", "is larger than 1 MiB"))
        return document
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        document.problems.append(Problem(raw.count(b"\n", 0, exc.start) + 1, "", "is not UTF-8"))
        return document
    try:
        loader = _Composer(text)
    except yaml.reader.ReaderError as exc:
        line = text.count("\n", 0, exc.position) + 1
        document.problems.append(Problem(line, "", f"the character {chr(exc.character)!a} is not allowed in YAML"))
        return document
    try:
        root = loader.get_single_node()
        document.problems += [Problem(line, "", "YAML tags are not allowed") for line in loader.tags]
    except yaml.MarkedYAMLError as exc:
        document.problems.append(_syntax_problem(exc))
    except (ValueError, OverflowError):  # of int() and chr(), which PyYAML gives whatever digits it finds
        problem = "is not valid YAML: a number or an escaped character is out of range"
        document.problems.append(Problem(loader.line + 1, "", problem))
    except RecursionError:
        document.problems.append(Problem(1, "", "is nested too deeply"))
    else:
        if root is not None and not _is_null(root):
            _read_section(root, "", keys, document)
    return document


class _Composer(yaml.SafeLoader):
    """Composes nodes and notes the lines on which a tag is written; a node tells no more whether it had one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.tags: list[int] = []

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            self.tags.append(event.start_mark.line + 1)
        return super().compose_node(parent, index)


def _syntax_problem(exc: yaml.MarkedYAMLError) -> Problem:
    mark = exc.problem_mark or exc.context_mark
    what = exc.problem or exc.context or "unreadable"
    if exc.context == "expected a single document in the stream":
        what = "a second document begins here; only one is allowed"
    return Problem(mark.line + 1 if mark else 1, "", f"is not valid YAML: {what}")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == f"{TAG}null"


def _read_section(node: yaml.Node, prefix: str, keys: Mapping[str, Kind], document: Document) -> None:
    known = {key[len(prefix) :].split(".")[0] for key in keys if key.startswith(prefix)}
    for name, name_node, value in _entries(node, prefix.rstrip("."), document):
        key = prefix + name
        if name not in known:
            document.problems.append(Problem(_line(name_node), key, unknown_key(name, known)))
        elif _is_null(value):
            continue
        elif key not in keys:  # then it is a section
            document.lines[key] = _line(name_node)
            _read_section(value, f"{key}.", keys, document)
        else:
            document.lines[key] = _line(name_node)
            found = _read_value(value, key, keys[key], document)
            if found is not None:
                document.values[key] = found


def _entries(node: yaml.Node, key: str, document: Document) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Name and value nodes of a mapping, each name once."""
    if not isinstance(node, yaml.MappingNode):
        document.problems.append(Problem(_line(node), key, "must be a mapping of names to values"))
        return
    first: dict[str, int] = {}
    for name_node, value in node.value:
        if not isinstance(name_node, yaml.ScalarNode):
            document.problems.append(Problem(_line(name_node), key, "has a name that is not a text"))
            continue
        name = name_node.value
        path = f"{key}.{name}" if key else name
        if name_node.tag not in {f"{TAG}str", f"{TAG}merge"}:
            document.problems.append(
                Problem(_line(name_node), path, f"has a name that is not a text, {_misread(name_node)}")
            )
        elif name in first:
            text = f"is given twice, first on line {first[name]}"
            document.problems.append(Problem(_line(name_node), path, text))
        else:
            first[name] = _line(name_node)
            yield name, name_node, value


def _read_value(node: yaml.Node, key: str, kind: Kind, document: Document) -> Value | None:
    if kind is dict:
        entries: dict[str, str] = {}
        for name, name_node, item in _entries(node, key, document):
            document.lines[f"{key}.{name}"] = _line(name_node)
            value = _read_value(item, f"{key}.{name}", str, document)
            if isinstance(value, str):
                entries[name] = value
        return entries
    if kind is tuple:
        return _read_list(node, key, document)
    try:
        return _read_scalar(node, kind)
    except ValueError as exc:
        document.problems.append(Problem(_line(node), key, str(exc)))
        return None


def _read_list(node: yaml.Node, key: str, document: Document) -> tuple[str, ...] | None:
    if not isinstance(node, yaml.SequenceNode):
        document.problems.append(Problem(_line(node), key, "must be a list"))
        return None
    items: list[str] = []
    for position, item in enumerate(node.value):
        document.lines[f"{key}.{position}"] = _line(item)
        value = _read_value(item, f"{key}.{position}", str, document)
        if isinstance(value, str):
            items.append(value)
    return tuple(items) if len(items) == len(node.value) else None


def _read_scalar(node: yaml.Node, kind: Kind) -> Value:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("must be a single value")  # noqa: TRY004 - a ValueError is what all of these are
    text, tag = str(node.value), node.tag.removeprefix(TAG)
    if kind is bool:
        if tag != "bool" or text.lower() not in BOOLEANS:  # a tag makes any text one
            raise ValueError("must be true or false, without quotes")
        return BOOLEANS[text.lower()]
    if kind is int:
        if tag != "int" or not DECIMAL.fullmatch(text):
            raise ValueError("must be a whole number in plain decimal digits, without quotes")
        return int(text)
    if kind is timedelta and tag in {"int", "float"}:
        if text != "0":
            raise ValueError("must be a duration with its unit, such as 90s or 1m30s")
        return text
    if kind is Size and tag == "int":
        return text
    if kind is Auto:
        return _read_switch(text if tag == "bool" or text == "auto" else "")
    if tag != "str":
        raise ValueError(f"must be a text, {_misread(node)}")
    return text


def _misread(node: yaml.ScalarNode) -> str:
    meaning = READ_AS.get(node.tag.removeprefix(TAG), "something else")
    return f"but YAML reads it as {meaning}: put it in quotes"  # without the value, which may be a token


def from_text(text: str, kind: Kind) -> Value:
    """The value of a flag or environment variable; ValueError says how it has to be written."""
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError("must be true, false, 1, 0, yes, no, on or off")
        return BOOLEANS[text.lower()]
    if kind is int:
        if not DECIMAL.fullmatch(text):
            raise ValueError("must be a whole number in plain decimal digits")
        return int(text)
    if kind is dict:
        try:
            entries = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            entries = None
        if not isinstance(entries, dict) or not all(isinstance(item, str) for item in entries.values()):
            raise ValueError('must be a JSON object of texts, such as {"rack": "12"}')
        return entries
    if kind is tuple:
        return tuple(item.strip() for item in text.split(","))
    if kind is Auto:
        return _read_switch(text)
    return text


def _read_switch(text: str) -> Value:
    if text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if text != "auto":
        raise ValueError("must be true, false or auto")
    return text


def unknown_key(name: str, known: set[str]) -> str:
    """The problem with a key nobody knows, with the known one it was perhaps meant to be."""
    near = min(((edit_distance(name, other), other) for other in known), default=(3, ""))
    return f"is unknown; did you mean {near[1]}?" if near[0] <= 2 else "is unknown"


def edit_distance(one: str, other: str) -> int:
    """How many letters have to be added, removed or replaced to get from one to the other."""
    if abs(len(one) - len(other)) > 2:
        return 3  # far enough for anybody who asks
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        previous, row[0] = row[0], number
        for column, candidate in enumerate(other, 1):
            previous, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, previous + (letter != candidate)),
            )
    return row[-1]
