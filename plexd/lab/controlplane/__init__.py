"""A whole control plane in memory: for a newcomer to run, for the tests to lean on, for whoever writes a real one.

It serves every call of the wire contract, refuses what an agent should not have sent and says why, signs and replays
events, and can be told over a second door (`admin.py` in process, `admin_api.py` on a Unix socket) to change its mind,
to misbehave, and what it has seen.
"""

from plexd.lab.controlplane.admin_client import Admin
from plexd.lab.controlplane.arrivals import Arrival
from plexd.lab.controlplane.command import Options, main
from plexd.lab.controlplane.faults import Effect, Fault
from plexd.lab.controlplane.refusal import Refusal
from plexd.lab.controlplane.serving import LabControlPlane

__all__ = ["Admin", "Arrival", "Effect", "Fault", "LabControlPlane", "Options", "Refusal", "main"]
