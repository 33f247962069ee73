"""`plexd peers`, `policies`, `log-status` and the like: what the daemon says over its socket, as a table.

`--json` prints the answer as it came.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from plexd.cli.asking import ask, decode, show
from plexd.cli.layout import format_bytes, named, since, table, terminal_width
from plexd.config.api_socket import find_socket

Document = dict[str, Any]


def peers(args: argparse.Namespace) -> int:
    return _tell(args, "/v1/peers", peer_lines, lambda found: found)


def policies(args: argparse.Namespace) -> int:
    return _tell(args, "/v1/policies", policy_lines, lambda found: found["policies"])


def pipeline(args: argparse.Namespace) -> int:
    """`args.route` says which one."""
    return _tell(args, args.route, pipeline_lines, lambda found: found["sources"])


def _tell(
    args: argparse.Namespace,
    route: str,
    lines: Callable[[Any, float, int | None], list[str]],
    items: Callable[[Any], Sequence[Document]],
) -> int:
    """`items` are what the table is of: where there is none, a person is told so."""
    body = ask(find_socket(vars(args), os.environ), route, as_json="json" in args)
    if "json" in args:
        show(body)
        return 0
    found = decode(body)
    show("\n".join(lines(found, time.time(), terminal_width())))
    if not items(found):
        print("(none)", file=sys.stderr)
    return 0


# text: `now` is in Unix seconds, `width` that of a terminal


def peer_lines(found: Sequence[Document], now: float, width: int | None) -> list[str]:
    return table(
        {
            "ID": lambda peer: peer["id"],
            "MESH-IP": lambda peer: peer["mesh_ip"] or "-",
            "ENDPOINT": lambda peer: peer["endpoint"] or "-",
            "HANDSHAKE": lambda peer: _since(peer["last_handshake_at"], now),
            "RX": lambda peer: format_bytes(peer["rx_bytes"]),
            "TX": lambda peer: format_bytes(peer["tx_bytes"]),
            "PATH": _path,
        },
        found,
        width,
    )


def _path(peer: Document) -> str:
    """Which way packets go and who named it, and what is in the way."""
    parts = [peer["path"], f"endpoint from {peer['endpoint_source']}" if peer["endpoint_source"] else None]
    way = ", ".join(part for part in parts if part)
    if peer["connected"]:
        return way
    obstacle = f"not connected: {peer['obstacle']['text']}"
    return f"{obstacle} ({way})" if way else obstacle


def policy_lines(found: Document, now: float, width: int | None) -> list[str]:
    """What becomes of what no rule decides, the rules in their order, and since when all that holds."""
    lines = table(
        {
            "POLICY": lambda rule: rule["policy"],
            "RULE": lambda rule: str(rule["index"]),
            "SRC": lambda rule: rule["src"] or "-",
            "DST": lambda rule: rule["dst"] or "-",
            "PORT": lambda rule: str(rule["port"] or "any"),
            "PROTO": lambda rule: rule["protocol"] or "any",
            "ACTION": lambda rule: rule["action"] or "-",
            "PACKETS": lambda rule: "-" if rule["packets"] is None else str(rule["packets"]),
            "BYTES": lambda rule: "-" if rule["packets"] is None else format_bytes(rule["bytes"]),
            "NOTE": lambda rule: rule["note"] or "",
        },
        [
            {**rule, "policy": policy["id"], "index": index}
            for policy in found["policies"]
            for index, rule in enumerate(policy["rules"])
        ],
        width,
    )
    standing = f"in force for {since(found['applied_at'], now)}" if found["applied_at"] else "not in force yet"
    if not found["enforced"]:
        standing = "policy.enabled is false: nothing is enforced, every peer reaches this node"
    return [f"default: {found['default']}", "", *lines, "", standing]


def pipeline_lines(found: Document, now: float, width: int | None) -> list[str]:
    """How it goes as a whole, then what it is fed from."""
    counters, last = found["counters"], found["last_delivery_at"]
    rows = [
        ("State", found["state"]),
        ("Buffered", f"{found['buffered']}/{found['capacity']}"),
        ("Sent", str(counters["sent"])),
        ("Dropped", ", ".join(f"{reason} {count}" for reason, count in counters["dropped"].items()) or "0"),
        ("Last delivery", f"{since(last, now)} ago" if last else "never"),
        ("Last error", found["last_error"] or "-"),
    ]
    sources = table(
        {
            "SOURCE": lambda source: source["name"],
            "STATE": lambda source: source["state"],
            "ENTRIES": lambda source: str(source["entries"]),
            "LAST": lambda source: _since(source["last_entry_at"], now),
            "DETAIL": lambda source: source["detail"] or "-",
        },
        found["sources"],
        width,
    )
    return [*named(rows, 15, width), "", *sources]


def _since(time_stamp: str | None, now: float) -> str:
    return since(time_stamp, now) if time_stamp else "never"
