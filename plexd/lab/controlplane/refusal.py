"""How the control plane says no."""

from __future__ import annotations

from pydantic import JsonValue


class Refusal(Exception):
    """The request is answered with `status` and `{"error": reason, **details}`; the reason holds no secret."""

    def __init__(self, status: int, reason: str, **details: JsonValue) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.details = details
