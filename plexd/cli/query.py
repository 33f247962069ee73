"""`plexd status`, `plexd peers`, `plexd log-status` and the like: ask the daemon over its socket and show what it says.

`--json` prints the answer as it came.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plexd.cli.asking import ask, decode, show
from plexd.config.api_socket import find_socket
from plexd.errors import FatalError
from plexd.mesh.age import format_age
from plexd.wire.times import parse_time

WATCH_SECONDS = 2.0
MIN_COLUMN = 8  # what a column keeps of its text at least when a terminal is too narrow

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


def peers(args: argparse.Namespace) -> int:
    body = ask(find_socket(vars(args), os.environ), "/v1/peers", as_json="json" in args)
    if "json" in args:
        show(body)
        return 0
    found = decode(body)
    show("\n".join(peer_lines(found, time.time(), terminal_width())))
    if not found:
        print("(none)", file=sys.stderr)
    return 0


def policies(args: argparse.Namespace) -> int:
    body = ask(find_socket(vars(args), os.environ), "/v1/policies", as_json="json" in args)
    if "json" in args:
        show(body)
        return 0
    found = decode(body)
    show("\n".join(policy_lines(found, time.time(), terminal_width())))
    if not found["policies"]:
        print("(none)", file=sys.stderr)
    return 0


def pipeline(args: argparse.Namespace) -> int:
    """`args.route` says which one."""
    body = ask(find_socket(vars(args), os.environ), args.route, as_json="json" in args)
    if "json" in args:
        show(body)
        return 0
    found = decode(body)
    show("\n".join(pipeline_lines(found, time.time())))
    if not found["sources"]:
        print("(none)", file=sys.stderr)
    return 0


# text


def terminal_width() -> int | None:
    """Columns of the terminal that is written to; None: it is none, and nothing has to fit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def has_colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


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
    lines = [line for name, value in rows for line in fit(f"{name + ':':<17}{value}", width, " " * 17)]
    for finding in node["conditions"]:
        lines += ["", *fit(f"{finding['code']} for {since(finding['since'], now)}: {finding['text']}", width)]
        lines += fit(f"  {finding['remedy']}", width)
    if colours:
        colour = COLOURS.get(node["state"], YELLOW)
        lines = [
            f"{line[:17]}\033[{colour}m{line[17:]}\033[0m" if line.startswith("State:") else line for line in lines
        ]
    return lines


def fit(line: str, width: int | None, indent: str = "  ") -> list[str]:
    """The line, wrapped where a terminal is too narrow for it."""
    if width is None or len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False)


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


def peer_lines(found: Sequence[Document], now: float, width: int | None) -> list[str]:
    """A table. In a terminal of `width` columns it is made to fit."""
    table = [("ID", "MESH-IP", "ENDPOINT", "HANDSHAKE", "RX", "TX")]
    table += [
        (
            peer["id"],
            peer["mesh_ip"] or "-",
            peer["endpoint"] or "-",
            since(peer["last_handshake_at"], now) if peer["last_handshake_at"] else "never",
            format_bytes(peer["rx_bytes"]),
            format_bytes(peer["tx_bytes"]),
        )
        for peer in found
    ]
    return _table(table, ["PATH", *map(_path, found)], width)


def policy_lines(found: Document, now: float, width: int | None) -> list[str]:
    """A table of the rules in their order, and what becomes of what none of them decides."""
    table = [("POLICY", "RULE", "ACTION", "SRC", "DST", "PROTOCOL", "PORT", "PACKETS", "BYTES")]
    notes = ["NOTE"]
    for policy in found["policies"]:
        for index, rule in enumerate(policy["rules"]):
            counted = rule["packets"] is not None
            table.append(
                (
                    policy["id"],
                    str(index),
                    rule["action"] or "-",
                    rule["src"] or "-",
                    rule["dst"] or "-",
                    rule["protocol"] or "any",
                    str(rule["port"]) if rule["port"] else "any",
                    str(rule["packets"]) if counted else "-",
                    format_bytes(rule["bytes"]) if counted else "-",
                )
            )
            notes.append(rule["note"] or "")
    lines = _table(table, notes, width)
    if not found["enforced"]:
        return [*lines, "", "policy.enabled is false: nothing is enforced, every peer reaches this node"]
    standing = f"in force for {since(found['applied_at'], now)}" if found["applied_at"] else "not in force yet"
    return [*lines, "", f"{standing}; what no rule decides: {found['default']}"]


def _table(rows: Sequence[Sequence[str]], last_column: Sequence[str], width: int | None) -> list[str]:
    """Lines with the columns under each other; in `width` columns the last one wraps below its row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    if width is not None:
        _narrow(widths, width)
    lines = []
    for row, last in zip(rows, last_column, strict=True):
        cells = "  ".join(f"{_cut(cell, size):<{size}}" for cell, size in zip(row, widths, strict=True))
        whole = f"{cells}  {last}".rstrip()
        if width is None or len(whole) <= width:
            lines.append(whole)
        else:
            lines.append(cells.rstrip())
            if row is not rows[0]:
                lines += textwrap.wrap(last, width, initial_indent="    ", subsequent_indent="    ")
    return lines


def pipeline_lines(found: Document, now: float) -> list[str]:
    counters = found["counters"]
    dropped = ", ".join(f"{reason} {count}" for reason, count in counters["dropped"].items())
    last = found["last_delivery_at"]
    rows = [
        ("State", found["state"]),
        ("Buffered", f"{found['buffered']}/{found['capacity']}"),
        ("Sent", str(counters["sent"])),
        ("Dropped", dropped or "0"),
        ("Last delivery", f"{since(last, now)} ago" if last else "never"),
        ("Last error", found["last_error"] or "-"),
    ]
    lines = [f"{name + ':':<15}{value}" for name, value in rows]
    table = [("SOURCE", "STATE", "ENTRIES", "LAST", "DETAIL")]
    table += [
        (
            source["name"],
            source["state"],
            str(source["entries"]),
            since(source["last_entry_at"], now) if source["last_entry_at"] else "never",
            source["detail"] or "-",
        )
        for source in found["sources"]
    ]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines.append("")
    lines += ["  ".join(f"{cell:<{size}}" for cell, size in zip(row, widths, strict=True)).rstrip() for row in table]
    return lines


def _path(peer: Document) -> str:
    """Which way packets go and who named it, and what is in the way."""
    parts = [peer["path"], f"endpoint from {peer['endpoint_source']}" if peer["endpoint_source"] else None]
    way = ", ".join(part for part in parts if part)
    if peer["connected"]:
        return way
    obstacle = f"not connected: {peer['obstacle']['text']}"
    return f"{obstacle} ({way})" if way else obstacle


def _narrow(widths: list[int], width: int) -> None:
    """Take from the widest column until the line fits or nothing can be spared."""
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > MIN_COLUMN:
        widths[widths.index(max(widths))] -= 1


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 1]}…"


def format_bytes(number: int) -> str:
    """`812B`, `1.2MiB`."""
    if number < 1024:
        return f"{number}B"
    size = float(number)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1023.95:
            return f"{size:.1f}{unit}"
    return f"{size / 1024:.1f}TiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def since(time_stamp: str, now: float) -> str:
    return format_age(now - (parse_time(time_stamp) or now))
