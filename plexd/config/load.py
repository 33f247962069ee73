"""The configuration in force: flag over environment over file over default. All mistakes are said at once."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from plexd.config.keys import KEYS
from plexd.config.layers import GENERIC, VARIABLES, Layers, named_file
from plexd.config.models import Config
from plexd.errors import ConfigError

NEED_API = frozenset({"up", "join"})
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Loaded:
    """`path` is the file that was read, None without one. `origins` says for every key where its value came from."""

    config: Config
    path: Path | None
    origins: Mapping[str, str]
    warnings: tuple[str, ...]


def load(flags: Mapping[str, str], environ: Mapping[str, str], *, command: str = "") -> Loaded:
    """The configuration in force for `command`, such as "up", which decides what must be set.

    `flags` has `config`, a path, and dotted keys, only those that were given; other names in it are ignored. Raises
    ConfigError with one line for each mistake, `<file>:<line>: <key>: <problem>`.
    """
    layers = _Candidate()
    path = layers.read_file(named_file(flags, environ))
    layers.read_environment(environ)
    layers.read_flags(flags)
    config = layers.validate()
    if config is not None:
        layers.check_files(config)
    layers.check_command(command)
    if layers.problems or config is None:
        raise ConfigError(*layers.sentences())
    layers.warn(config, environ)
    origins = {key: layers.given[key].origin if key in layers.given else DEFAULT for key in KEYS}
    return Loaded(config, path, origins, tuple(layers.warnings))


class _Candidate(Layers):
    """A configuration for all keys, while it is judged."""

    def __init__(self) -> None:
        super().__init__(KEYS)

    def validate(self) -> Config | None:
        tree: dict[str, Any] = {}
        for key, given in self.given.items():
            *sections, name = key.split(".")
            branch = tree
            for section in sections:
                branch = branch.setdefault(section, {})
            branch[name] = given.value
        try:
            return Config.model_validate(tree)
        except ValidationError as exc:
            for error in exc.errors(include_url=False, include_input=False):
                path = ".".join(str(part) for part in error["loc"] if part != "[key]")
                message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
                self.complain(self.origin(path), path, message)
            return None

    def check_files(self, config: Config) -> None:
        ca_file = config.tls.ca_file
        if ca_file is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca_file)
            except ssl.SSLError:
                problem = f"{ca_file} holds no certificate in PEM form"
            except OSError as exc:
                problem = f"{ca_file} cannot be read: {exc.strerror}"
            else:
                return
            self.complain(self.origin("tls.ca_file"), "tls.ca_file", problem)

    def check_command(self, command: str) -> None:
        mistaken = {problem.key for problem in self.problems}
        if command in NEED_API and "api" not in self.given and "api" not in mistaken:
            text = f"is not set; give --api URL, set PLEXD_API, or write `api: https://...` into {self.file}"
            self.complain("", "api", text)

    def warn(self, config: Config, environ: Mapping[str, str]) -> None:
        known = {*VARIABLES, "PLEXD_CONFIG", "PLEXD_BOOTSTRAP_TOKEN", config.token.env}
        unknown = sorted(
            name for name in environ if name.startswith("PLEXD_") and not name.startswith(GENERIC) and name not in known
        )
        if unknown:
            self.warnings.append(f"unknown environment variables: {', '.join(unknown)}")
        if config.tls.insecure_skip_verify:
            self.warnings.append("tls.insecure_skip_verify is set: the control plane's certificate is not verified")
