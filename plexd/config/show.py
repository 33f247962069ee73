"""The configuration in force as people and programs may see it: without its secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import yaml
from pydantic import BaseModel, SecretStr

from plexd.config.document import TAG
from plexd.config.keys import KEYS
from plexd.config.models import Config
from plexd.wire.durations import format_duration

REDACTED = "[redacted]"
SECRET_NAME = re.compile(r"token|secret|password|key|psk|auth|credential")
NAMES_A_PLACE = ("_file", "_path", "_env", "_dir", "_url")


def redacted(config: Config) -> dict[str, Any]:
    """As in the file, nested, in JSON's types, with every text masked whose key sounds like a secret."""
    return _section(config, "")


def _section(model: BaseModel, prefix: str) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, value in model:
        key = f"{prefix}{name}"
        shown[name] = _section(value, f"{key}.") if isinstance(value, BaseModel) else _shown(key, value)
    return shown


def _shown(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shown(f"{key}.{name}", item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_shown(key, item) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, timedelta):
        return format_duration(value.total_seconds())
    if isinstance(value, SecretStr):
        return REDACTED
    # the whole path counts, so that token.file is a place and an entry named api_key is a secret
    path = key.replace(".", "_").lower()
    if SECRET_NAME.search(path) and not path.endswith(NAMES_A_PLACE):
        return REDACTED
    return str(value)


def as_yaml(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """The same as YAML; with `origins`, each value is followed by where it came from."""
    return "".join(f"{line}\n" for line in _lines(redacted(config), "", origins))


class _Dumper(yaml.SafeDumper):
    """Writes a text with line ends or other control characters in it as one line, with escapes."""


def _written(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(f"{TAG}str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _written)


def _lines(section: dict[str, Any], prefix: str, origins: Mapping[str, str] | None) -> list[str]:
    lines = []
    indent = "  " * prefix.count(".")
    for name, value in section.items():
        key = f"{prefix}{name}"
        if key not in KEYS:
            lines += [f"{indent}{name}:", *_lines(value, f"{key}.", origins)]
            continue
        text = yaml.dump({name: value}, Dumper=_Dumper, default_flow_style=False, width=1 << 20, allow_unicode=True)
        first, *rest = text.splitlines()  # no value has an end of line in it, not even one of Unicode's
        comment = f"  # {origins[key]}" if origins is not None else ""
        lines += [f"{indent}{first}{comment}", *(f"{indent}{line}" for line in rest)]
    return lines
