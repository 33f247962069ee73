"""One target under atheris: `python -m tests.fuzz.fuzzer TARGET`, then what libFuzzer takes: flags, folders, inputs."""

from __future__ import annotations

import importlib
import sys

import atheris


def main(target: str, arguments: list[str]) -> None:
    with atheris.instrument_imports(include=["plexd", "yaml"]):
        check = importlib.import_module(f"tests.fuzz.{target}").check
    # to merge, libFuzzer starts its own program again, through a shell
    atheris.Setup([f"{sys.executable} -m tests.fuzz.fuzzer {target}", *arguments], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
