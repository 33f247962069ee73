"""The control-plane client: the only room that speaks HTTP to the control plane, and the one owner of retries.

`client` makes the calls, `retries` repeats them, `network` opens the way there; `body`, `answer` and `clock` decide
what a body, a status and a date mean, and do no I/O. `metadata` asks somebody else, the cloud, for what the node needs
to introduce itself.
"""

from plexd.control.client import ControlPlane
from plexd.control.metadata import fetch_token
from plexd.control.network import tls_context

__all__ = ["ControlPlane", "fetch_token", "tls_context"]
