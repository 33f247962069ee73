"""Completion as the shells do it: what they offer after what was typed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PLEXD = Path(sys.executable).with_name("plexd")

CASES = [
    ("plexd st", {"status", "state"}),
    ("plexd state ", {"get", "report", "--json", "--help"}),
    ("plexd state get ", {"metadata", "data", "report", "secret", "--raw"}),
    ("plexd --config /x status --w", {"--watch"}),
    ("plexd --socket state get --ra", set()),  # `state` is the socket, so `get` is no command
    ("plexd lab up --nat ", {"none", "full-cone", "symmetric"}),
    ("plexd completion ", {"bash", "zsh", "fish"}),
    ("plexd config c", {"check"}),
]


def script(shell: str) -> str:
    return subprocess.run([PLEXD, "completion", shell], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("typed", "offered"), CASES)
def test_bash(tmp_path: Path, typed: str, offered: set[str]) -> None:
    words = typed.split(" ")
    program = f"""{script("bash")}
COMP_WORDS=({" ".join(repr(word) for word in words)}) COMP_CWORD={len(words) - 1}
_plexd
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    check(words[-1], offered, set(done.stdout.split()))
    assert done.stderr == ""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
@pytest.mark.parametrize(("typed", "offered"), CASES)
def test_zsh(typed: str, offered: set[str]) -> None:
    """With the two functions of the completion system that take what is offered."""
    words = typed.split(" ")
    program = f"""
compdef() {{ : }}
compadd() {{ shift; print -l -- $@ }}
_describe() {{ print -l -- ${{(P)2}} }}
{script("zsh")}
words=({" ".join(repr(word) for word in words)}) CURRENT={len(words)}
_plexd
"""
    done = subprocess.run(["zsh", "-f", "-c", program], capture_output=True, text=True, check=True)
    found = {line.partition(":")[0] for line in done.stdout.splitlines()}
    # the completion system itself leaves out what does not begin as typed
    check(words[-1], offered, {word for word in found if word.startswith(words[-1])})
    assert done.stderr == ""


def check(begun: str, offered: set[str], found: set[str]) -> None:
    assert offered <= found
    assert all(word.startswith(begun) for word in found)
    if begun:
        assert found == offered


def test_fish_has_every_command_and_flag() -> None:
    text = script("fish")
    assert "complete -c plexd -n \"__plexd_at ''\" -a 'status' -d 'how this node is'" in text
    assert "complete -c plexd -n \"__plexd_at 'lab/up'\" -l nat -x -a 'none full-cone symmetric'" in text
    assert "complete -c plexd -n \"__plexd_at 'join'\" -l token-file -r -F" in text
    if shutil.which("fish"):
        subprocess.run(["fish", "--no-execute"], input=text, text=True, check=True)


def test_other_shell_is_wrong_usage() -> None:
    assert subprocess.run([PLEXD, "completion", "ksh"], capture_output=True, check=False).returncode == 2
