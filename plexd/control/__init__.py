"""The control-plane client: the only room that speaks HTTP to the control plane, and the one owner of retries.

`client` makes the calls, `retries` repeats them, `network` opens the way there; `body`, `answer` and `clock` decide
what a body, a status and a date mean, and do no I/O.
"""

from plexd.control.client import ControlPlane
from plexd.control.network import tls_context

__all__ = ["ControlPlane", "tls_context"]
