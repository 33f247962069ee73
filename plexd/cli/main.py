"""`plexd`: reads the command line, runs one command, turns errors into one line and an exit code.

The module of a command is imported when it runs, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import cast

from plexd.cli.parser import parser
from plexd.errors import ConfigError, FatalError, PlexdError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments`, by default this process's own; returns the exit code."""
    top = parser()
    args = top.parse_args(arguments)
    if "runs" not in args:
        top.print_help()
        return 0
    module, _, function = args.runs.partition(":")
    try:
        run = cast("Callable[[argparse.Namespace], int]", getattr(importlib.import_module(module), function))
        code = run(args)
        sys.stdout.flush()
    except ConfigError as exc:
        say(*exc.problems)
        return exc.exit_code
    except FatalError as exc:
        say(f"plexd: {exc}")
        return exc.exit_code
    except PlexdError as exc:
        say(f"plexd: {exc}")
        return 1
    except BrokenPipeError:  # whoever read our output has enough; the interpreter's own flush must not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def say(*lines: str) -> None:
    """To stderr; under systemd with the priority of an error, so that the journal shows it as one."""
    prefix = ""
    if "JOURNAL_STREAM" in os.environ:  # a person at a terminal does not wait for the log to load
        from plexd.log import PRIORITIES, detect_format  # noqa: PLC0415

        prefix = f"<{PRIORITIES['error']}>" if detect_format(sys.stderr, os.environ) == "journal" else ""
    from plexd.masking import mask  # noqa: PLC0415 - only who has something to say pays

    for line in lines:
        print(prefix + mask(line), file=sys.stderr)
