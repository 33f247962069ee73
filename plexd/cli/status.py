"""`plexd status`: how this node is, once or as a live view."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plexd.cli.asking import ask, decode, show
from plexd.cli.layout import fit, has_colours, named, since, terminal_width
from plexd.config.api_socket import find_socket
from plexd.errors import FatalError

WATCH_SECONDS = 2.0
TITLE_WIDTH = 17

GREEN, YELLOW, RED = "32", "33", "31"
COLOURS = {"connected": GREEN, "degraded": RED}  # of states; the others are on the way

Document = dict[str, Any]


def status(args: argparse.Namespace) -> int:
    path = find_socket(vars(args), os.environ)
    if not args.watch:
        show(_status(path, args))
        return 0
    if sys.stdout.isatty() and "json" not in args:
        return _live(lambda: _status(path, args))
    while True:
        show(_status(path, args))
        sys.stdout.flush()
        time.sleep(WATCH_SECONDS)
        print()


def _status(path: Path, args: argparse.Namespace) -> str:
    body = ask(path, "/v1/status", as_json="json" in args)
    if "json" in args:
        return body
    return "\n".join(status_lines(decode(body), time.time(), terminal_width(), has_colours()))


def _live(tell: Callable[[], str]) -> int:
    """Draw what is told over what was drawn before, until Ctrl-C; the screen is as it was afterwards.

    A daemon that is away for a moment is told as well: it is what one watches for.
    """
    sys.stdout.write("\033[?1049h\033[?25l")
    try:
        while True:
            try:
                lines = tell().splitlines()
            except FatalError as exc:
                lines = [f"plexd: {exc}"]
            columns, rows = shutil.get_terminal_size()
            head = f"plexd status at {time.strftime('%H:%M:%S')}, every {WATCH_SECONDS:.0f} s until Ctrl-C"
            drawn = [head[:columns], "", *lines][: rows - 1]
            sys.stdout.write("\033[H" + "".join(f"{line}\033[K\n" for line in drawn) + "\033[J")
            sys.stdout.flush()
            time.sleep(WATCH_SECONDS)
    finally:
        sys.stdout.write("\033[?25h\033[?1049l")
        sys.stdout.flush()


def status_lines(node: Document, now: float, width: int | None = None, colours: bool = False) -> list[str]:
    """`now` is in Unix seconds; in a terminal of `width` columns long lines are wrapped."""
    version = node["version"] or "-"
    if node["binary_checksum"]:
        version += f" ({node['binary_checksum'][:15]}…)"
    rows = [
        ("Node", f"{node['node_id'] or 'not registered'} ({node['hostname'] or '-'})"),
        ("State", node["state"]),
        ("Conditions", ", ".join(finding["code"] for finding in node["conditions"]) or "-"),
        ("Mode", node["mode"]),
        ("Version", version),
        ("Uptime", since(node["started_at"], now)),
        ("Mesh", _mesh(node)),
        ("NAT", f"{node['nat']['public_endpoint']} ({node['nat']['type']})" if node["nat"] else "-"),
        ("Control plane", _control_plane(node["control_plane"], now)),
        ("Reconcile", _reconcile(node["control_plane"], now)),
    ]
    if counts := node["counts"]:
        reports = f"reports {counts['reports']} ({counts['reports_pending']} pending)"
        kinds = ", ".join(f"{kind} {counts[kind]}" for kind in ("metadata", "data", "secrets"))
        rows.append(("State entries", f"{kinds}, {reports}"))
    actions, hooks = node["actions"], node["hooks"]
    rows += [
        (
            "Actions",
            f"enabled, {actions['running']}/{actions['max_concurrent']} running" if actions["enabled"] else "off",
        ),
        ("Hooks", f"{hooks['total']}, {hooks['not_ok']} not ok" if hooks["enabled"] else "off"),
    ]
    lines = named(rows, TITLE_WIDTH, width)
    for finding in node["conditions"]:
        lines += ["", *fit(f"{finding['code']} for {since(finding['since'], now)}: {finding['text']}", width)]
        lines += fit(f"  {finding['remedy']}", width)
    if colours:
        colour = COLOURS.get(node["state"], YELLOW)
        lines = [
            f"{line[:TITLE_WIDTH]}\033[{colour}m{line[TITLE_WIDTH:]}\033[0m" if line.startswith("State:") else line
            for line in lines
        ]
    return lines


def _mesh(node: Document) -> str:
    mesh = node["mesh"]
    if mesh is None:
        return "-"
    parts = [f"{mesh['interface']} {'up' if mesh['up'] else 'down'}", node["mesh_ip"] or "-"]
    if mesh["listen_port"] is not None:
        parts.append(f"port {mesh['listen_port']}")
    return ", ".join([*parts, _count(mesh["peer_count"], "peer")])


def _control_plane(contact: Document, now: float) -> str:
    parts = [contact["url"] or "-", f"stream {contact['event_stream']}", _count(contact["reconnects"], "reconnect")]
    if contact["last_heartbeat_at"]:
        verdict = "ok" if contact["last_heartbeat_ok"] else "failed"
        parts.append(f"heartbeat {verdict} {since(contact['last_heartbeat_at'], now)} ago")
    return ", ".join(parts)


def _reconcile(contact: Document, now: float) -> str:
    text = f"{since(contact['last_reconcile_at'], now)} ago" if contact["last_reconcile_at"] else "never"
    return f"{text}, since then: {contact['last_reconcile_error']}" if contact["last_reconcile_error"] else text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
