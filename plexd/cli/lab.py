"""`plexd lab up`, `plexd lab policies` and `plexd lab controlplane`.

The lab's control plane uses starlette and uvicorn, which a node does not need: the extra `lab` installs them. Importing
this module raises LabError where they are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from plexd import log
from plexd.lab.admin import Admin
from plexd.lab.namespaces import LabError, Nat
from plexd.lab.up import DIRECTORY
from plexd.lab.up import up as tour

try:
    from plexd.lab.controlplane import Options, main
except ModuleNotFoundError as exc:
    if exc.name not in {"starlette", "uvicorn"}:
        raise
    raise LabError("the lab needs starlette and uvicorn, which are not installed: pip install plexd[lab]") from exc

OPTIONS = {"listen", "http", "mesh_cidr", "tokens", "stun"}


def up(args: argparse.Namespace) -> int:
    log.set_up("info", "auto")
    return tour(args.nodes, keep=args.keep, nat=Nat(args.nat), ipv6=args.ipv6)


def policies(args: argparse.Namespace) -> int:
    path = Path(getattr(args, "admin_socket", DIRECTORY / "admin.sock"))
    if not path.exists():
        raise LabError(
            f"no lab control plane at {path}: start one with plexd lab up --keep, or name its --admin-socket"
        )
    with Admin(path) as admin:
        if args.file is None:
            print(json.dumps(admin.policies(), indent=2))
            return 0
        try:
            text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text(encoding="utf-8")
            wanted = json.loads(text)
        except (OSError, ValueError) as exc:
            raise LabError(f"{args.file} cannot be used: {exc}") from exc
        if not isinstance(wanted, list):
            raise LabError(f'{args.file} must hold a list of policies, such as [{{"id": "web", "rules": [...]}}]')
        admin.set_policies(wanted)
        print(f"{len(wanted)} policies set")
    return 0


def controlplane(args: argparse.Namespace) -> int:
    log.set_up("info", "auto")
    given = {name: value for name, value in vars(args).items() if name in OPTIONS}
    paths = {"tls_dir": "tls_directory", "admin_socket": "admin_socket", "state_file": "state_file"}
    given |= {option: Path(getattr(args, name)).absolute() for name, option in paths.items() if name in args}
    return main(Options(**given))
