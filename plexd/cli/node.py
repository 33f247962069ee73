"""The commands that make a node: `plexd up`, `join`, `down`, `deregister`."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

from plexd import daemon
from plexd.config.load import Loaded, load
from plexd.errors import ConfigError, FatalError, PrivilegeError
from plexd.identity import join_and_leave
from plexd.identity.join_and_leave import Refused

MAX_TOKEN_BYTES = 512

T = TypeVar("T")


def up(args: argparse.Namespace) -> int:
    return daemon.run(lambda: load(vars(args), os.environ, command="up"))


def join(args: argparse.Namespace) -> int:
    loaded = load(vars(args), os.environ, command="join")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either signal ends the attempt
    token = _token_from_stdin() if args.token_stdin else None
    ask = _ask_for_token if sys.stdin.isatty() and sys.stderr.isatty() else None
    joined = _as_command(lambda: join_and_leave.join(loaded, token_text=token, ask=ask, force=args.force))
    if joined.already_registered:
        print("already registered", file=sys.stderr)
    _answer(args, asdict(joined), f"node_id: {joined.node_id}", f"mesh_ip: {joined.mesh_ip}")
    return 0


def down(args: argparse.Namespace) -> int:
    loaded = load(vars(args), os.environ, command="down")
    removed = _as_command(lambda: join_and_leave.down(loaded))
    _answer(args, {"removed": list(removed)}, "mesh down" if removed else "nothing to take down")
    return 0


def deregister(args: argparse.Namespace) -> int:
    loaded = load(vars(args), os.environ, command="deregister")
    if args.purge:
        _check_purge(args, loaded)
    left = _as_command(lambda: join_and_leave.deregister(loaded, purge=args.purge, force=args.force))
    answer = {"node_id": left.node_id, "deregistered": bool(left.node_id), "purged": left.purged}
    lines = [f"node {left.node_id} deregistered"] if left.node_id else []
    _answer(args, answer, *lines, *(["local data purged"] if left.purged else []))
    return 0


def _check_purge(args: argparse.Namespace, loaded: Loaded) -> None:
    data_dir = loaded.config.data_dir
    if loaded.path is None and "data_dir" not in args:
        raise Refused(
            f"not purged: without a configuration file {data_dir} might not be this node's; say which with --data-dir"
        )
    if args.yes or not sys.stdin.isatty():
        return
    print(f"Deregister this node and delete everything in {data_dir}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise Refused("nothing was changed")


def _token_from_stdin() -> str | None:
    # one byte more than a token may have shows that there is more; an empty source is no source
    return sys.stdin.buffer.read(MAX_TOKEN_BYTES + 1).decode("utf-8", "replace").strip() or None


def _ask_for_token() -> str:
    return getpass.getpass("Bootstrap token: ", stream=sys.stderr)


def _as_command(work: Callable[[], T]) -> T:
    """The codes of a refused registration, unusable state and the like are `up`'s, for systemd; here they all are 1."""
    try:
        return work()
    except (ConfigError, PrivilegeError):
        raise
    except FatalError as exc:
        raise Refused(str(exc)) from exc


def _answer(args: argparse.Namespace, answer: dict[str, object], *lines: str) -> None:
    if "json" in args:
        print(json.dumps(answer))
    else:
        print("\n".join(lines))
