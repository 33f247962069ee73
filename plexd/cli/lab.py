"""`plexd lab up` and `plexd lab controlplane`."""

from __future__ import annotations

import argparse
from pathlib import Path

from plexd import log
from plexd.lab.controlplane import Options, main
from plexd.lab.up import up as tour


def up(args: argparse.Namespace) -> int:
    log.set_up("info", "auto")
    return tour(args.nodes, keep=args.keep)


def controlplane(args: argparse.Namespace) -> int:
    log.set_up("info", "auto")
    given = {name: value for name, value in vars(args).items() if name in {"listen", "http", "mesh_cidr", "tokens"}}
    paths = {"tls_dir": "tls_directory", "admin_socket": "admin_socket", "state_file": "state_file"}
    given |= {option: Path(getattr(args, name)).absolute() for name, option in paths.items() if name in args}
    return main(Options(**given))
