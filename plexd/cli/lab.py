"""`plexd lab up` and `plexd lab controlplane`."""

from __future__ import annotations

import argparse
from pathlib import Path

from plexd import log
from plexd.lab.controlplane import Options, main
from plexd.lab.namespaces import Nat
from plexd.lab.up import up as tour

OPTIONS = {"listen", "http", "mesh_cidr", "tokens", "stun"}


def up(args: argparse.Namespace) -> int:
    log.set_up("info", "auto")
    return tour(args.nodes, keep=args.keep, nat=Nat(args.nat))


def controlplane(args: argparse.Namespace) -> int:
    log.set_up("info", "auto")
    given = {name: value for name, value in vars(args).items() if name in OPTIONS}
    paths = {"tls_dir": "tls_directory", "admin_socket": "admin_socket", "state_file": "state_file"}
    given |= {option: Path(getattr(args, name)).absolute() for name, option in paths.items() if name in args}
    return main(Options(**given))
