"""Imported before anything else by what becomes the daemon: keeps programs for terminals out of its memory.

structlog loads rich (for tracebacks in colour), and httpx loads click, rich and pygments (for its command line), when
they find them installed. A daemon never uses them, and they cost megabytes and start time. So both libraries are
loaded here, while those names cannot be imported; afterwards they can again, for whoever wants them.
"""

import sys

UNWANTED = ("rich", "click", "pygments")

_hidden = [name for name in UNWANTED if name not in sys.modules]
for _name in _hidden:
    sys.modules[_name] = None  # type: ignore[assignment]  # Python's own sign for "this import fails"

import httpx  # noqa: E402, F401
import structlog  # noqa: E402, F401

for _name in _hidden:
    del sys.modules[_name]
