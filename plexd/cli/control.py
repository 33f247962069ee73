"""`plexd reconcile`, `plexd reload` and `plexd health`: what is asked of the daemon, and whether it lives."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
from collections.abc import Mapping

from plexd.cli.asking import ask, decode, exchange, show
from plexd.config.api_socket import find_health, find_socket
from plexd.errors import ConfigError, FatalError

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - to be reached from this host


def reconcile(args: argparse.Namespace) -> int:
    body = ask(find_socket(vars(args), os.environ), "/v1/reconcile", as_json="json" in args, method="POST")
    show(body if "json" in args else "reconciliation requested")
    return 0


def reload(args: argparse.Namespace) -> int:
    body = ask(find_socket(vars(args), os.environ), "/v1/config/reload", as_json="json" in args, method="POST")
    if "json" in args:
        show(body)
        return 0
    document = decode(body)
    for title, member in (("changed", "changed"), ("restart required", "restart_required")):
        print(f"{title}: {', '.join(document[member]) or 'none'}")
    return 0


def health(args: argparse.Namespace) -> int:
    route = "/readyz" if args.ready else "/healthz"
    status, reason = _probe(vars(args), route, args.timeout)
    print(json.dumps({"ok": status == 200, "reason": reason}) if "json" in args else "ok" if status == 200 else reason)
    return 0 if status == 200 else 1


def _probe(flags: Mapping[str, str], route: str, seconds: float) -> tuple[int | None, str | None]:
    """Status and what is wrong: from the health listener if there is one, else over the socket of the API."""
    try:
        status, body = _probe_listener(flags, route, seconds) or exchange(
            find_socket(flags, os.environ), "GET", route, seconds=seconds
        )
    except ConfigError:
        raise
    except FatalError as exc:
        return None, str(exc)
    if status == 200:
        return status, None
    try:
        return status, str(json.loads(body)["reason"])
    except (ValueError, KeyError, TypeError):
        return status, f"status {status}"


def _probe_listener(flags: Mapping[str, str], route: str, seconds: float) -> tuple[int, str] | None:
    listener = find_health(flags, os.environ)
    if listener is None:
        return None
    host, port = listener
    connection = http.client.HTTPConnection(EVERYWHERE.get(host, host), port, timeout=seconds)
    with contextlib.closing(connection):
        try:
            connection.request("GET", route)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except (OSError, ValueError, http.client.HTTPException):
            return None  # the socket may tell more
