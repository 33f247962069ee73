"""Where values come from: flag over environment over file over default. All mistakes are said at once."""

from __future__ import annotations

import contextlib
import os
import ssl
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from plexd.config.document import KEYS, MAX_BYTES, SECTIONS, Value, from_text, read_document, unknown_key
from plexd.config.models import Config, NodeApi
from plexd.errors import ConfigError

DEFAULT_PATH = Path("/etc/plexd/config.yaml")
VARIABLES = {
    "PLEXD_API": "api",
    "PLEXD_MODE": "mode",
    "PLEXD_LOG_LEVEL": "log_level",
    "PLEXD_LOG_FORMAT": "log_format",
    "PLEXD_DATA_DIR": "data_dir",
    "PLEXD_HOSTNAME": "hostname",
    "PLEXD_BOOTSTRAP_TOKEN_FILE": "token.file",
    "PLEXD_NODE_API_ENABLED": "node_api.enabled",
    "PLEXD_NODE_API_SOCKET": "node_api.socket",
}
FLAGS = {"node_api.socket": "--socket"}  # those not named like their key
GENERIC = "PLEXD__"
NEED_API = frozenset({"up", "join"})
NEED_POLICY_OFF = frozenset({"up", "config check"})
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Loaded:
    """`path` is the file that was read, None without one. `origins` says for every key where its value came from."""

    config: Config
    path: Path | None
    origins: Mapping[str, str]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Given:
    value: Value
    origin: str


def load(flags: Mapping[str, str], environ: Mapping[str, str], *, command: str = "") -> Loaded:
    """The configuration in force for `command`, such as "up", which decides what must be set.

    `flags` has `config`, a path, and dotted keys, only those that were given; other names in it are ignored. Raises
    ConfigError with one line for each mistake, `<file>:<line>: <key>: <problem>`.
    """
    layers = _Layers()
    path = layers.read_file(flags.get("config") or environ.get("PLEXD_CONFIG") or None)
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


def find_socket(flags: Mapping[str, str], environ: Mapping[str, str]) -> Path:
    """Where the daemon's API socket should be, for who asks it: from flag, environment or file, else the default.

    Whoever may open the socket need not be able to read the file, so a file that cannot be read is passed over, and so
    is everything else in it. Raises ConfigError when what is given for the socket cannot be one.
    """
    layers = _Layers()
    with contextlib.suppress(ConfigError):
        layers.read_file(flags.get("config") or environ.get("PLEXD_CONFIG") or None)
    layers.read_environment(environ)
    layers.read_flags(flags)
    return layers.validate_socket()


@dataclass(frozen=True, slots=True)
class _Problem:
    """`line` is one of the file, 0 when the problem stands elsewhere."""

    line: int
    origin: str
    key: str
    text: str

    def __str__(self) -> str:
        text = ": ".join(part for part in (self.origin, self.key, self.text) if part)
        # a name in the file can hold line ends and what a terminal obeys
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class _Layers:
    """What was given so far; each layer covers the ones before it."""

    def __init__(self) -> None:
        self.given: dict[str, _Given] = {}
        self.problems: list[_Problem] = []
        self.warnings: list[str] = []
        self._file = DEFAULT_PATH
        self._lines: dict[str, int] = {}

    def read_file(self, explicit: str | None) -> Path | None:
        path = self._file = Path(explicit).absolute() if explicit else DEFAULT_PATH
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                raw = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            if explicit:
                raise ConfigError(f"{path}: the configuration file does not exist") from None
            return None
        except IsADirectoryError:
            raise ConfigError(f"{path}: is a directory, not a configuration file") from None
        except OSError as exc:
            raise ConfigError(f"{path}: the configuration file cannot be read: {exc.strerror}") from exc
        document = read_document(raw)
        for problem in document.problems:
            self._complain(f"{path}:{problem.line}", problem.key, problem.text)
        self._lines = document.lines
        for key, value in document.values.items():
            self.given[key] = _Given(value, f"{path}:{document.lines[key]}")
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            self.warnings.append(f"{path} can be written by others than its owner: chmod 640 {path}")
        if "token.value" in document.values and mode & stat.S_IROTH:
            self.warnings.append(f"{path} holds token.value and can be read by everybody: chmod 640 {path}")
        return path

    def read_environment(self, environ: Mapping[str, str]) -> None:
        for name in sorted(environ):
            if name.startswith(GENERIC) and environ[name]:
                key = name.removeprefix(GENERIC).lower().replace("__", ".")
                if key in KEYS:
                    self._give(key, environ[name], name)
                else:
                    problem = "names a section, not a key" if key in SECTIONS else unknown_key(key, set(KEYS))
                    self._complain(name, key, problem)
        for name, key in VARIABLES.items():  # last, so that they win over the generic form
            if environ.get(name):
                self._give(key, environ[name], name)

    def read_flags(self, flags: Mapping[str, str]) -> None:
        for key, text in flags.items():
            if key in KEYS:
                self._give(key, text, FLAGS.get(key) or "--" + key.replace(".", "-").replace("_", "-"))

    def _give(self, key: str, text: str, origin: str) -> None:
        try:
            self.given[key] = _Given(from_text(text, KEYS[key]), origin)
        except ValueError as exc:
            self._complain(origin, key, str(exc))

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
                self._complain(self._origin(path), path, message)
            return None

    def validate_socket(self) -> Path:
        given = self.given.get("node_api.socket")
        try:
            return NodeApi().socket if given is None else NodeApi.model_validate({"socket": given.value}).socket
        except ValidationError as exc:
            message = exc.errors(include_url=False, include_input=False)[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{self._origin('node_api.socket')}: node_api.socket: {message}") from None

    def _origin(self, path: str) -> str:
        """Where the key, or the entry of a map, was given."""
        key = path
        while key not in self.given:
            key = key.rpartition(".")[0]
        origin = self.given[key].origin
        if path in self._lines and origin == f"{self._file}:{self._lines[key]}":
            return f"{self._file}:{self._lines[path]}"
        return origin

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
            self._complain(self._origin("tls.ca_file"), "tls.ca_file", problem)

    def check_command(self, command: str) -> None:
        mistaken = {problem.key for problem in self.problems}
        if command in NEED_API and "api" not in self.given and "api" not in mistaken:
            text = f"is not set; give --api URL, set PLEXD_API, or write `api: https://...` into {self._file}"
            self._complain("", "api", text)
        enabled = self.given.get("policy.enabled", _Given(True, DEFAULT))
        if command in NEED_POLICY_OFF and enabled.value is True and "policy.enabled" not in mistaken:
            text = (
                "is true, but this version does not enforce network policy yet; set `policy.enabled: false` to run"
                " without it, every peer then reaches this node"
            )
            self._complain(enabled.origin, "policy.enabled", text)

    def _complain(self, origin: str, key: str, text: str) -> None:
        file, _, line = origin.rpartition(":")
        self.problems.append(_Problem(int(line) if file == str(self._file) else 0, origin, key, text))

    def sentences(self) -> list[str]:
        """One for each problem, those of the file first and in its order."""
        return [str(problem) for problem in sorted(self.problems, key=lambda problem: problem.line or sys.maxsize)]

    def warn(self, config: Config, environ: Mapping[str, str]) -> None:
        known = {*VARIABLES, "PLEXD_CONFIG", "PLEXD_BOOTSTRAP_TOKEN", config.token.env}
        unknown = sorted(
            name for name in environ if name.startswith("PLEXD_") and not name.startswith(GENERIC) and name not in known
        )
        if unknown:
            self.warnings.append(f"unknown environment variables: {', '.join(unknown)}")
        if config.tls.insecure_skip_verify:
            self.warnings.append("tls.insecure_skip_verify is set: the control plane's certificate is not verified")
