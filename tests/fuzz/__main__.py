"""`make fuzz`: each target for a while, from the corpus on; what it found, and where the input is that shows it.

`python -m tests.fuzz --seconds 600 config_file` for longer looks; `--merge` then adds to the corpus what reached code
that nothing in it reaches.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path

from tests.fuzz import TARGETS

CORPUS = Path(__file__).with_name("corpus")
FUZZER = (sys.executable, "-m", "tests.fuzz.fuzzer")
FOUND = Path(".cache/fuzz")  # what grows while fuzzing
PROGRESS_SECONDS = 10
INPUT_SECONDS = 30  # one that takes longer is a finding, even on a busy machine
MAX_BYTES = 4096


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--seconds", type=int, default=30, help="for each target (default: 30)")
    parser.add_argument("--merge", action="store_true", help="add what reaches new code to the corpus")
    args = parser.parse_args(arguments)
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    failed = [target for target in args.targets or TARGETS if not fuzz(target, args.seconds)]
    if args.merge:
        for target in args.targets or TARGETS:
            merge(target)
    if failed:
        print(f"failures in {', '.join(failed)}; an input that is put into the corpus is replayed by make test")
    return 1 if failed else 0


def fuzz(target: str, seconds: int) -> bool:
    """False when an input was found that makes the target fail."""
    folder = FOUND / target
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    words = importlib.import_module(f"tests.fuzz.{target}").WORDS
    (folder / "words").write_text("".join(f'"{_escaped(word)}"\n' for word in words))
    flags = {
        "max_total_time": seconds,
        "max_len": MAX_BYTES,
        "timeout": INPUT_SECONDS,
        "artifact_prefix": f"{folder}/",
        "dict": folder / "words",
    }
    print(f"{target}: fuzzing for {seconds} s", flush=True)
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [
                *FUZZER,
                target,
                *(f"-{name}={value}" for name, value in flags.items()),
                folder / "corpus",
                CORPUS / target,
            ],
            stdout=file,
            stderr=file,
        )
    return watch(target, process, log)


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def watch(target: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    try:
        while True:
            try:
                code = process.wait(PROGRESS_SECONDS)
                break
            except subprocess.TimeoutExpired:
                print(f"  {progress(log)}", flush=True)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    text = log.read_text(errors="replace")
    if code == 0:
        print(f"{target}: nothing found, {progress(log)}", flush=True)
        return True
    _, mark, told = text.partition(" === Uncaught Python exception: ===")
    failure = told.partition("\n==")[0].rstrip() if mark else text[-2000:]
    print(f"{target}: FAILED{failure}")
    for path in re.findall(r"Test unit written to (\S+)", text):
        print(f"the input: {path}\nagain:     {sys.executable} -m tests.fuzz.fuzzer {target} {path}", flush=True)
    return False


def progress(log: Path) -> str:
    """From the last line that libFuzzer wrote when it learned something."""
    lines = re.findall(r"^#(\d+)\s.* cov: (\d+) .* corp: (\d+)/", log.read_text(errors="replace"), re.MULTILINE)
    if not lines:
        return "starting"
    inputs, edges, kept = lines[-1]
    return f"{inputs} inputs, {edges} places in the code, {kept} kept"


def merge(target: str) -> None:
    corpus = CORPUS / target
    corpus.mkdir(parents=True, exist_ok=True)
    before = len(list(corpus.iterdir()))
    subprocess.run(
        [*FUZZER, target, "-set_cover_merge=1", f"-max_len={MAX_BYTES}", corpus, FOUND / target / "corpus"],
        check=True,
        capture_output=True,
    )
    print(f"{target}: {len(list(corpus.iterdir())) - before} inputs added to {corpus}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
