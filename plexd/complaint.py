"""What a check finds wrong with this machine: one line, with the cause and what to do."""

from __future__ import annotations

from typing import NamedTuple


class Complaint(NamedTuple):
    """`check` is a stable word for what was looked at; `cause` and `remedy` are for people."""

    check: str
    cause: str
    remedy: str
