"""The systemd unit of the daemon, for commands that need it stopped."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

STOP_SECONDS = 75  # the unit's own TimeoutStopSec


def stop_unit(unit: str) -> bool:
    """Stop the unit if systemd runs it; whether it was running and is stopped now."""
    if not _systemctl("is-active", "--quiet", unit):
        return False
    return _systemctl("stop", unit)


def disable_unit(unit: str) -> bool:
    """Keep the unit from starting at boot, as far as there is one."""
    return _systemctl("disable", "--quiet", unit)


def _systemctl(*arguments: str) -> bool:
    program = shutil.which("systemctl")
    if program is None or not Path("/run/systemd/system").is_dir():
        return False
    try:
        done = subprocess.run([program, *arguments], capture_output=True, check=False, timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
