"""Who may do what on the API socket: told by the kernel, which knows who connected (docs/contract/node-api.md §2 and
§2.1).
"""

from __future__ import annotations

import os

from plexd.api.http_server import Request, Response
from plexd.api.routes import Right, refuse
from plexd.linux.unix_socket import group_id, is_member

READERS, SECRET_READERS = "plexd", "plexd-secrets"


class OpenGate:
    """For probes: nobody is asked who they are, and nothing that has a right can be asked for."""

    async def check(self, request: Request, right: Right) -> Response | None:  # noqa: ARG002 - any request
        return None if right is Right.NONE else refuse(403, "access_denied", "this is not done here")


class SocketGate:
    """Groups are looked up when it is made and by `look_up_groups`, not for every request."""

    def __init__(self) -> None:
        self.look_up_groups()

    def look_up_groups(self) -> None:
        """Blocks for the host's user database, which may be a server that is down."""
        self.readers = group_id(READERS)
        self._secret_readers = group_id(SECRET_READERS)

    async def check(self, request: Request, right: Right) -> Response | None:
        caller = request.caller
        if right is Right.NONE or (caller is not None and caller.uid in {0, os.geteuid()}):
            return None
        group = {Right.READ: self.readers, Right.REPORT: self.readers, Right.SECRET: self._secret_readers}.get(right)
        if caller is not None and group is not None and await is_member(caller, group):
            return None
        if right is Right.SECRET:
            return refuse(
                403, "secret_access_denied", f"only root and members of the group {SECRET_READERS} may read secrets"
            )
        if right is Right.ADMIN:
            return refuse(403, "access_denied", "only root may do this")
        return refuse(403, "access_denied", f"only root and members of the group {READERS} may ask this")
