"""The daemon, from the configuration to the exit code; `life` is where to begin."""

# first, before httpx and structlog bring what a daemon does not need
import plexd.runtime.slim_imports  # noqa: F401

# isort: split
from plexd.daemon.life import run

__all__ = ["run"]
