"""What only root may have done: a reconciliation now, the configuration read again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from plexd.api.http_server import Response
from plexd.api.routes import Call, Right, Route, answer, refuse
from plexd.config.reload import Reloaded
from plexd.errors import ConfigError

Reload = Callable[[], Awaitable[Reloaded]]
"""Raises ConfigError, and leaves everything as it was then."""


def admin_routes(reconcile: Callable[[], bool], reload: Reload) -> tuple[Route, ...]:
    """`reconcile` asks for a cycle; False: there is nothing to reconcile before the node is registered."""

    async def reconcile_now(_: Call) -> Response:
        if not reconcile():
            return refuse(503, "registration_pending", "this node is not registered yet")
        return Response(202, b'{"status":"triggered"}')

    async def reload_now(_: Call) -> Response:
        try:
            reloaded = await reload()
        except ConfigError as exc:
            return refuse(422, "config_invalid", "; ".join(exc.problems))
        changed, waiting = list(reloaded.changed), list(reloaded.restart_required)
        return answer({"status": "reloaded", "changed": changed, "restart_required": waiting})

    return (
        Route("POST", "/v1/reconcile", Right.ADMIN, reconcile_now),
        Route("POST", "/v1/config/reload", Right.ADMIN, reload_now),
    )
