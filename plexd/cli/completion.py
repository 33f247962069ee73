"""`plexd completion`: a script that has bash, zsh or fish complete the command line, made from the parser itself."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from plexd.cli.asking import show
from plexd.cli.parser import parser


class Place(NamedTuple):
    """What may follow a command: subcommands and flags with what they do, and words of its arguments."""

    path: tuple[str, ...]
    commands: Mapping[str, str]
    flags: Mapping[str, str]
    words: tuple[str, ...]

    def at(self, joint: str) -> str:
        return joint.join(self.path)


def completion(args: argparse.Namespace) -> int:
    top = parser()
    places = tuple(_places(top, ()))
    show(SHELLS[args.shell](places, _flags_with_value(top)))
    return 0


def _subparsers(parser: argparse.ArgumentParser) -> Iterator[argparse._SubParsersAction[argparse.ArgumentParser]]:
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to be looked at
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            yield action


def _places(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> Iterator[Place]:
    commands: dict[str, str] = {}
    children: dict[str, argparse.ArgumentParser] = {}
    for group in _subparsers(parser):
        commands |= {choice.dest: choice.help or "" for choice in group._choices_actions}  # noqa: SLF001
        children |= {name: group.choices[name.partition(" ")[0]] for name in commands}
    flags: dict[str, str] = {}
    words: list[str] = []
    for action in parser._actions:  # noqa: SLF001
        if action.option_strings:
            flags[action.option_strings[-1]] = (action.help or "").partition(" (default")[0]
        elif action.choices is not None and action.nargs != argparse.PARSER:
            words += [str(choice) for choice in action.choices]
    # one with an alias is called `up (run)`
    yield Place(path, {name.partition(" ")[0]: text for name, text in commands.items()}, flags, tuple(words))
    for name, child in children.items():
        yield from _places(child, (*path, name.partition(" ")[0]))


def _flags_with_value(parser: argparse.ArgumentParser) -> Mapping[str, tuple[str, ...]]:
    """Every flag that takes a value, and the words it can be; none: anything, as a rule a file."""
    found: dict[str, tuple[str, ...]] = {}
    for action in parser._actions:  # noqa: SLF001
        if action.nargs != 0:
            choices = tuple(map(str, action.choices or ())) if action.option_strings else ()
            found |= dict.fromkeys(action.option_strings, choices)
    for group in _subparsers(parser):
        for child in group.choices.values():
            found |= _flags_with_value(child)
    return found


def _bash(places: tuple[Place, ...], values: Mapping[str, tuple[str, ...]]) -> str:
    cases = "\n".join(
        f'        "{place.at("/")}") words="{" ".join([*place.commands, *place.words, *place.flags])}" ;;'
        for place in places
    )
    chosen = "\n".join(
        f'            {flag}) words="{" ".join(choices)}" ;;' for flag, choices in values.items() if choices
    )
    return f"""\
# bash completion of plexd; to be sourced, or saved as /etc/bash_completion.d/plexd
_plexd() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} path= pending= words= word i
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${{COMP_WORDS[i]}}
        if [[ -n $pending ]]; then
            pending=
        elif [[ $word == -* ]]; then
            [[ " {" ".join(values)} " == *" $word "* ]] && pending=$word
        elif [[ " {" ".join(place.at("/") for place in places)} " == *" ${{path:+$path/}}$word "* ]]; then
            path=${{path:+$path/}}$word
        fi
    done
    if [[ -n $pending ]]; then
        case $pending in
{chosen}
            *) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        esac
        COMPREPLY=($(compgen -W "$words" -- "$cur"))
        return
    fi
    case $path in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -F _plexd plexd
"""


def _zsh(places: tuple[Place, ...], values: Mapping[str, tuple[str, ...]]) -> str:
    cases = "\n".join(f'        ("{place.at("/")}") items=({" ".join(_zsh_items(place))}) ;;' for place in places)
    chosen = "\n".join(
        f"            ({flag}) items=({' '.join(choices)}) ;;" for flag, choices in values.items() if choices
    )
    return f"""\
#compdef plexd
# zsh completion of plexd; to be saved as _plexd in a directory of $fpath
_plexd() {{
    local path_= pending= word
    local -a items
    local -a valued=({" ".join(values)})
    local -a places=({" ".join(place.at("/") for place in places if place.path)})
    for word in ${{words[2,CURRENT-1]}}; do
        if [[ -n $pending ]]; then
            pending=
        elif [[ $word == -* ]]; then
            (( ${{valued[(Ie)$word]}} )) && pending=$word
        elif (( ${{places[(Ie)${{path_:+$path_/}}$word]}} )); then
            path_=${{path_:+$path_/}}$word
        fi
    done
    if [[ -n $pending ]]; then
        case $pending in
{chosen}
            (*) _files; return ;;
        esac
        compadd -- $items
        return
    fi
    case $path_ in
{cases}
    esac
    _describe plexd items
}}
if [[ $funcstack[1] == _plexd ]]; then
    _plexd "$@"
else
    compdef _plexd plexd
fi
"""


def _zsh_items(place: Place) -> Iterator[str]:
    described = {**place.commands, **dict.fromkeys(place.words, ""), **place.flags}
    for name, text in described.items():
        yield _quoted(f"{name}:{text}" if text else name)


def _fish(places: tuple[Place, ...], values: Mapping[str, tuple[str, ...]]) -> str:
    lines = [
        "# fish completion of plexd; to be saved as ~/.config/fish/completions/plexd.fish",
        "function __plexd_at",
        "    set -l place",
        "    set -l pending",
        f"    set -l valued {' '.join(values)}",
        f"    set -l places {' '.join(place.at('/') for place in places if place.path)}",
        "    for word in (commandline -opc)[2..]",
        '        if test -n "$pending"',
        "            set pending",
        "        else if string match -q -- '-*' $word",
        "            contains -- $word $valued; and set pending $word",
        "        else if contains -- (string join / $place $word) $places",
        "            set place (string join / $place $word)",
        "        end",
        "    end",
        '    test "$place" = "$argv[1]"',
        "end",
        "complete -c plexd -f",
    ]
    for place in places:
        condition = f"-n \"__plexd_at '{place.at('/')}'\""
        for name, text in {**place.commands, **dict.fromkeys(place.words, "")}.items():
            lines.append(f"complete -c plexd {condition} -a {_quoted(name)}" + (f" -d {_quoted(text)}" if text else ""))
        for flag, text in place.flags.items():
            takes = (
                f" -x -a {_quoted(' '.join(values[flag]))}" if values.get(flag) else " -r -F" if flag in values else ""
            )
            lines.append(f"complete -c plexd {condition} -l {flag.removeprefix('--')}{takes} -d {_quoted(text)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


SHELLS: Mapping[str, Callable[[tuple[Place, ...], Mapping[str, tuple[str, ...]]], str]] = {
    "bash": _bash,
    "zsh": _zsh,
    "fish": _fish,
}
