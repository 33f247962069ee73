"""Where the daemon's API socket and its health listener should be, for who asks it.

Asking takes a fraction of the time that the models and pydantic take to load, so this does without them: a few keys,
read as all are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from plexd.config.layers import Layers, named_file
from plexd.config.paths import DEFAULT_SOCKET, socket_path, split_listen
from plexd.errors import ConfigError

KEY = "node_api.socket"
ENABLED, LISTEN = "health.enabled", "health.listen"
DEFAULT_HEALTH = ("127.0.0.1", 9101)


def find_socket(flags: Mapping[str, str], environ: Mapping[str, str]) -> Path:
    """From flag, environment or file, else the default.

    Whoever may open the socket need not be able to read the file, so a file that cannot be read is passed over, and so
    is everything else in it. Raises ConfigError when what is given for the socket cannot be one.
    """
    layers = Layers({KEY: str})
    with contextlib.suppress(ConfigError):
        layers.read_file(named_file(flags, environ))
    layers.read_environment(environ)
    layers.read_flags(flags)
    given = layers.given.get(KEY)
    if given is None:
        return DEFAULT_SOCKET
    try:
        return socket_path(str(given.value))
    except ValueError as exc:
        raise ConfigError(f"{given.origin}: {KEY}: {exc}") from None


def find_health(flags: Mapping[str, str], environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Host and port of the health listener, None without one; what is given for it and cannot be is passed over."""
    layers = Layers({ENABLED: bool, LISTEN: str})
    with contextlib.suppress(ConfigError):
        layers.read_file(named_file(flags, environ))
    layers.read_environment(environ)
    enabled, listen = layers.given.get(ENABLED), layers.given.get(LISTEN)
    if enabled is None or enabled.value is not True:
        return None
    try:
        return split_listen(str(listen.value)) if listen is not None else DEFAULT_HEALTH
    except ValueError:
        return None
