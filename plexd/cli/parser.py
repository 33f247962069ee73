"""Reads the command line: argparse, fed from the table of the commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from plexd import __version__
from plexd.cli.commands import COMMANDS, EXAMPLES, GLOBAL_FLAGS, OVERVIEW, Argument, Command, OneOf

COMMIT, BUILT = "none", "unknown"  # a release build writes its own here


class Parser(argparse.ArgumentParser):
    """Says what is wrong and where help is, in two lines instead of a usage dump."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            **options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"plexd: {message}\ntry: {self.prog} --help\n")


def parser() -> Parser:
    """The whole command line."""
    top = Parser(prog="plexd", description=OVERVIEW, epilog=EXAMPLES)
    _add_global_flags(top)
    _add_commands(top, COMMANDS, required=False)
    return top


def _add_commands(parser: Parser, commands: Sequence[Command], *, required: bool) -> None:
    places = parser.add_subparsers(title="commands", metavar="COMMAND", required=required)
    for command in commands:
        place = places.add_parser(
            command.name,
            aliases=command.aliases,
            help=command.summary,
            description=command.description,
            epilog=command.examples,
        )
        _add_global_flags(place)
        if command.runs:
            place.set_defaults(runs=command.runs, **command.sets)
        for argument in command.arguments:
            _add(place, argument)
        if command.commands:
            _add_commands(place, command.commands, required=not command.runs)


def _add_global_flags(parser: Parser) -> None:
    """Before and after the command; the second parser must not overwrite what the first one found."""
    flags = parser.add_argument_group("flags for every command")
    for flag in GLOBAL_FLAGS:
        _add(flags, flag)
    version = f"plexd version {__version__}\ncommit: {COMMIT}\nbuilt: {BUILT}"
    flags.add_argument("--version", action="version", version=version, help="print the version and exit")
    flags.add_argument("-h", "--help", action="help", help="print this help and exit")


def _add(place: argparse._ActionsContainer, argument: Argument | OneOf) -> None:
    if isinstance(argument, OneOf):
        choice = place.add_mutually_exclusive_group(required=True)
        for one in argument.arguments:
            _add(choice, one)
    else:
        place.add_argument(*argument.names, **argument.options)
