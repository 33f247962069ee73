"""The lock files: what a node installs, what a contributor installs, and nothing about where it comes from."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-fuzz.lock")
PINNED = re.compile(r"([a-z0-9][a-z0-9.-]*)==(\S+) \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
# pip-compile's own line above pip and setuptools
HEADING = "# The following packages are considered to be unsafe in a requirements file:"


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return {found[1]: found[2] for found in map(PINNED.fullmatch, lines) if found}


def required(specifications: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9.-]", specification, maxsplit=1)[0].lower() for specification in specifications}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = required(PROJECT["dependencies"])
EXTRAS = {name: required(packages) for name, packages in PROJECT["optional-dependencies"].items()}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_holds_names_versions_and_hashes_only(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    assert lines
    others = [line for line in lines if not PINNED.fullmatch(line) and not HASH.fullmatch(line)]
    assert others in ([], ["", HEADING])


def test_the_runtime_lock_holds_every_dependency_of_a_node() -> None:
    assert set(pins("requirements.lock")) >= RUNTIME


def test_the_runtime_lock_holds_nothing_of_the_extras() -> None:
    assert set(pins("requirements.lock")).isdisjoint(set.union(*EXTRAS.values()) - RUNTIME)


def test_the_development_lock_holds_the_extras_and_the_same_versions_as_the_runtime_lock() -> None:
    development = pins("requirements-dev.lock")
    assert set(development) >= set.union(RUNTIME, *EXTRAS.values())
    assert pins("requirements.lock").items() <= development.items()
