"""One target under atheris: `python -m tests.fuzz.fuzzer TARGET`, then what libFuzzer takes: flags, folders, inputs."""

from __future__ import annotations

import importlib
import sys

import atheris


def main(target: str, arguments: list[str]) -> None:
    # the syntax of YAML has to be explored, but an input is worth keeping for what it reaches in plexd
    packages = ["plexd"] if any("merge" in argument for argument in arguments) else ["plexd", "yaml"]
    with atheris.instrument_imports(include=packages):
        check = importlib.import_module(f"tests.fuzz.{target}").check
    # to merge, libFuzzer starts its own program again, through a shell
    atheris.Setup([f"{sys.executable} -m tests.fuzz.fuzzer {target}", *arguments], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
