"""`plexd why`: one answer about one peer, with the reason and what to do at the end."""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from plexd.cli.asking import NotThere, ask, decode, show
from plexd.cli.layout import fit, format_bytes, named, since, terminal_width
from plexd.config.api_socket import find_socket

Document = dict[str, Any]

TITLE_WIDTH = 14
MAX_RULES = 5  # of a direction, in words; --json has them all


def why(args: argparse.Namespace) -> int:
    body = _find(find_socket(vars(args), os.environ), args.peer, as_json="json" in args)
    peer = decode(body)
    show(body if "json" in args else "\n".join(why_lines(peer, time.time(), terminal_width())))
    return 0 if peer["connected"] else 1


def _find(path: Path, name: str, *, as_json: bool) -> str:
    """The daemon knows peers by id and mesh address; a host name is looked up here."""
    try:
        return ask(path, _route(name), as_json=False)
    except NotThere as unknown:
        for address in _addresses(name):
            try:
                return ask(path, _route(address), as_json=False)
            except NotThere:
                continue
        if as_json:
            return ask(path, _route(name), as_json=True)  # to have its answer printed; or the peer has come meanwhile
        raise NotThere(f"{unknown}: no id, no mesh address, and no host name of one") from None


def _route(name: str) -> str:
    return f"/v1/peers/{quote(os.fsencode(name), safe='')}"


def _addresses(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return []
    return [str(address[0]) for *_, address in found]


def why_lines(peer: Document, now: float, width: int | None) -> Iterator[str]:
    """`now` is in Unix seconds; in a terminal lines are wrapped at `width`."""
    yield from named(_rows(peer, now), TITLE_WIDTH, width)
    yield ""
    obstacle = peer["obstacle"]
    if obstacle is None:
        yield "connected"
    else:
        yield from fit(f"{obstacle['code']}: {obstacle['text']}", width)
        yield from fit(f"  {obstacle['remedy']}", width)


def _rows(peer: Document, now: float) -> Iterator[tuple[str, str]]:
    node = peer["node"]
    yield "Peer", f"{peer['id']} ({peer['mesh_ip'] or 'no mesh address'})"
    yield "Connected", "yes" if peer["connected"] else "no"
    if peer["endpoint"]:
        yield "Path", f"{peer['path']} to {peer['endpoint']} ({peer['endpoint_source']})"
    else:
        yield "Path", "none"
    handshake = f"{since(peer['last_handshake_at'], now)} ago" if peer["last_handshake_at"] else "never"
    traffic = f"{format_bytes(peer['tx_bytes'])} sent, {format_bytes(peer['rx_bytes'])} received"
    yield "Handshake", f"{handshake}; {traffic}"
    for number, candidate in enumerate(peer["candidates"]):
        resolved = "" if candidate["resolved"] in {None, candidate["endpoint"]} else f" = {candidate['resolved']}"
        yield "" if number else "Endpoints", f"{candidate['endpoint'] or 'none'}{resolved} (from {candidate['source']})"
    nat = node["nat"]
    yield "This node", f"{nat['public_endpoint']}, NAT {nat['type']}" if nat else "does not know how peers reach it"
    yield "MTU", str(node["mtu"]) if node["mtu"] else "-"
    policy = node["policy"]
    if policy is None:
        yield "Policy", "not enforced"
    else:
        yield "From it", _decided(policy["inward"], policy["default"])
        yield "To it", _decided(policy["outward"], policy["default"])
    fetched = f"fetched {since(node['state_fetched_at'], now)} ago" if node["state_fetched_at"] else "never fetched"
    yield "State", f"{fetched}, {node['generation']} events since the start"


def _decided(rules: list[Document], default: str) -> str:
    """What the policies say about one direction, in their order."""
    parts = [_rule(rule) for rule in rules[:MAX_RULES]]
    if len(rules) > MAX_RULES:
        parts.append(f"{len(rules) - MAX_RULES} more rules")
    if not rules or rules[-1]["port"] or rules[-1]["protocol"] != "any":
        parts.append(f"else {default}" if rules else f"{default}, by default")
    return "; ".join(parts)


def _rule(rule: Document) -> str:
    what = "all" if rule["protocol"] == "any" and not rule["port"] else rule["protocol"]
    port = f" port {rule['port']}" if rule["port"] else ""
    counted = f", {rule['packets']} packets" if rule["packets"] is not None else ""
    return f"{rule['action']} {what}{port} (policy {rule['policy']} rule {rule['rule']}{counted})"
