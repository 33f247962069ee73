"""What is given for each key, by the file, the environment and the flags; what is wrong with it is all kept."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from plexd.config.document import MAX_BYTES, Kind, Value, from_text, read_document, unknown_key
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
    "PLEXD_NODE_API_HTTP_ENABLED": "node_api.http.enabled",
    "PLEXD_NODE_API_HTTP_LISTEN": "node_api.http.listen",
}
FLAGS = {"node_api.socket": "--socket"}  # those not named like their key
GENERIC = "PLEXD__"


@dataclass(frozen=True, slots=True)
class Given:
    value: Value
    origin: str


@dataclass(frozen=True, slots=True)
class Mistake:
    """`line` is one of the file, 0 when the problem stands elsewhere."""

    line: int
    origin: str
    key: str
    text: str

    def __str__(self) -> str:
        text = ": ".join(part for part in (self.origin, self.key, self.text) if part)
        # a name in the file can hold line ends and what a terminal obeys
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def named_file(flags: Mapping[str, str], environ: Mapping[str, str]) -> str | None:
    """The file that somebody asked for, None when it is the default one."""
    return flags.get("config") or environ.get("PLEXD_CONFIG") or None


class Layers:
    """What was given so far for `keys`; each layer covers the ones before it. `file` is the one to look into."""

    def __init__(self, keys: Mapping[str, Kind]) -> None:
        self._keys = keys
        self.given: dict[str, Given] = {}
        self.problems: list[Mistake] = []
        self.warnings: list[str] = []
        self.file = DEFAULT_PATH
        self._lines: dict[str, int] = {}

    def read_file(self, explicit: str | None) -> Path | None:
        path = self.file = Path(explicit).absolute() if explicit else DEFAULT_PATH
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
        document = read_document(raw, self._keys)
        for problem in document.problems:
            self.complain(f"{path}:{problem.line}", problem.key, problem.text)
        self._lines = document.lines
        for key, value in document.values.items():
            self.given[key] = Given(value, f"{path}:{document.lines[key]}")
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            self.warnings.append(f"{path} can be written by others than its owner: chmod 640 {path}")
        if "token.value" in document.values and mode & stat.S_IROTH:
            self.warnings.append(f"{path} holds token.value and can be read by everybody: chmod 640 {path}")
        return path

    def read_environment(self, environ: Mapping[str, str]) -> None:
        for name in sorted(environ):
            if name.startswith(GENERIC) and environ[name]:
                key = name.removeprefix(GENERIC).lower().replace("__", ".")
                if key in self._keys:
                    self._give(key, environ[name], name)
                else:
                    is_section = any(known.startswith(f"{key}.") for known in self._keys)
                    problem = "names a section, not a key" if is_section else unknown_key(key, set(self._keys))
                    self.complain(name, key, problem)
        for name, key in VARIABLES.items():  # last, so that they win over the generic form
            if key in self._keys and environ.get(name):
                self._give(key, environ[name], name)

    def read_flags(self, flags: Mapping[str, str]) -> None:
        for key, text in flags.items():
            if key in self._keys:
                self._give(key, text, FLAGS.get(key) or "--" + key.replace(".", "-").replace("_", "-"))

    def _give(self, key: str, text: str, origin: str) -> None:
        try:
            self.given[key] = Given(from_text(text, self._keys[key]), origin)
        except ValueError as exc:
            self.complain(origin, key, str(exc))

    def origin(self, path: str) -> str:
        """Where the key, or the entry of a map, was given; of a default, where its section is. Empty: nowhere."""
        key = path
        while key and key not in self.given:
            key = key.rpartition(".")[0]
        if not key:  # a check of a whole section, or of a default
            key = next((given for given in self.given if given.startswith(f"{path}.")), "")
        if not key:
            line = self._lines.get(path.rpartition(".")[0])
            return f"{self.file}:{line}" if line is not None else ""
        origin = self.given[key].origin
        if path in self._lines and origin == f"{self.file}:{self._lines[key]}":
            return f"{self.file}:{self._lines[path]}"
        return origin

    def complain(self, origin: str, key: str, text: str) -> None:
        file, _, line = origin.rpartition(":")
        self.problems.append(Mistake(int(line) if file == str(self.file) else 0, origin, key, text))

    def sentences(self) -> list[str]:
        """One for each problem, those of the file first and in its order."""
        return [str(problem) for problem in sorted(self.problems, key=lambda problem: problem.line or sys.maxsize)]
