"""Where the daemon's API socket should be, for who asks it.

Asking takes a fraction of the time that the models and pydantic take to load, so this does without them: one key, read
and judged as all are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from plexd.config.layers import Layers, named_file
from plexd.config.paths import DEFAULT_SOCKET, socket_path
from plexd.errors import ConfigError

KEY = "node_api.socket"


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
