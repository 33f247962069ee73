"""`plexd config check` and `plexd config show`."""

from __future__ import annotations

import argparse
import json
import os
import sys

from plexd.config.load import load
from plexd.config.show import as_yaml, redacted


def check(args: argparse.Namespace) -> int:
    flags = vars(args)
    if args.path is not None:
        flags = {**flags, "config": args.path}
    loaded = load(flags, os.environ, command="config check")
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if loaded.path is None:
        print("no configuration file, using environment and defaults", file=sys.stderr)
    print("ok")
    return 0


def show(args: argparse.Namespace) -> int:
    loaded = load(vars(args), os.environ)
    if "json" in args:
        shown = {"config": redacted(loaded.config)} | ({"origin": dict(loaded.origins)} if args.origin else {})
        print(json.dumps(shown, indent=2))
    else:
        print(as_yaml(loaded.config, loaded.origins if args.origin else None), end="")
    return 0
