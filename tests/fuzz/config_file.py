"""The configuration file, `plexd/config/`: every mistake has its line, and what `config show` prints is a file."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from plexd.config.document import Value, read_document
from plexd.config.keys import KEYS
from plexd.config.load import Loaded, load
from plexd.config.show import as_yaml, redacted
from plexd.errors import ConfigError

WORDS = (
    *(f"{name}: ".encode() for name in sorted({part for key in KEYS for part in key.split(".")})),
    b"\n  ", b"\n    - ", b"!!bool ", b"!!str ", b"&a ", b"*a", b"<<: *a", b"%YAML 1.1", b"---\n", b"...\n", b"true",
    b"1m30s", b"60:30", b"2026-03-01", b'"\\ud800"', b'"\\U0001f600"', b'"\\e"', b"192.0.2.1:51820", b"| \n", b"null",
)  # fmt: skip


def check(data: bytes) -> None:
    document = read_document(data, KEYS)
    for problem in document.problems:
        assert problem.key or problem.text
        assert problem.line >= 1
    assert document.values.keys() <= KEYS.keys()
    assert document.values.keys() <= document.lines.keys()
    if not document.problems and b"<<" not in data:
        check_values(data, document.values)
    if "tls.ca_file" in document.values:
        return  # it would be opened, whatever it is
    try:
        loaded = loaded_from(data)
    except ConfigError as exc:
        check_sentences(exc.problems)
        return
    assert not document.problems
    shown = as_yaml(loaded.config, loaded.origins)
    assert redacted(loaded_from(shown.encode()).config) == redacted(loaded.config)


def check_values(data: bytes, values: Mapping[str, Value]) -> None:
    """What PyYAML constructs is the same, and nothing stands there twice."""
    root = yaml.compose(data, Loader=yaml.SafeLoader)
    if isinstance(root, yaml.MappingNode):
        assert len({name.value for name, _ in root.value}) == len(root.value)
    plain = dict(leaves(yaml.safe_load(data) or {}))
    assert plain.keys() == values.keys()
    for key, value in plain.items():
        assert str(values[key]) == str(tuple(value) if isinstance(value, list) else value)


def leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        key = prefix + name
        if key in KEYS and value is not None:
            yield key, value
        elif value is not None:
            yield from leaves(value, f"{key}.")


def check_sentences(sentences: tuple[str, ...]) -> None:
    assert sentences
    for sentence in sentences:
        assert re.match(r"/[^:]+:[1-9][0-9]*: ", sentence)
        assert sentence.isprintable()


def loaded_from(raw: bytes) -> Loaded:
    with tempfile.NamedTemporaryFile() as file:
        file.write(raw)
        file.flush()
        return load({"config": file.name}, {})
