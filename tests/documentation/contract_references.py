"""Checks that every reference to a section of the contract resolves.

Code and pages name a section as `docs/contract/mesh.md §6.7`. The pages of the contract leave out the directory, and
for their own sections the name of the page. Outside those pages a reference may go on with further sections of the
same page: `docs/contract/mesh.md §6.2 and §6.7`. Sections are the numbered headings: `## 6. Policy`, `### 6.7 Failure`.

`python -m tests.documentation.contract_references` prints each problem as `file:line: problem` and ends with 1 if there
is one.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = Path("docs/contract")
CHECKED = (
    "plexd/**/*.py", "tests/**/*.py", "docs/**/*.md", "*.md", "config.example.yaml", "Makefile", "pyproject.toml",
    "systemd/*", ".ci/*",
)  # fmt: skip
EXAMPLES = Path("tests/documentation/test_contract_references.py")  # holds wrong references on purpose

_NUMBER = r"\d+(?:\.\d+)*"
_GAP = r"(?:\s|\n[ \t]*\#[ \t]*)+"  # a reference may continue on the next line of a text or a comment
_HEADING = re.compile(rf"#{{2,}} ({_NUMBER})\.? \S")
_FENCE = re.compile(r"\s*(```|~~~)")
_PAGE = r"(?P<directory>[\w./-]*/)?(?P<page>[a-z][a-z-]*\.md)"
_SECTION = rf"§[ ]?(?P<section>{_NUMBER})"
_REFERENCE = re.compile(
    rf"(?:{_PAGE}`?(?:{_GAP}|(?=§)))?{_SECTION}(?P<more>(?:(?:,|,?{_GAP}(?:and|or|to)){_GAP}§[ ]?{_NUMBER})*)"
)
_PAGE_ALONE = re.compile(rf"docs/contract/([a-z][a-z-]*\.md)(?!`?{_GAP}§)")
_OLD_FORMS = re.compile(
    rf"""\b(?P<rfc>RFC{_GAP}\d+,?{_GAP})?sections?{_GAP}{_NUMBER}\b
      | \bcontract,?{_GAP}{_NUMBER}\b
      | \b(?:mesh|bridge|wire|lifecycle|events|node-api|telemetry|actions|access|operations)\.md`?,?{_GAP}{_NUMBER}\b
    """,
    re.VERBOSE,
)
_RFC_BEFORE = re.compile(rf"RFC{_GAP}\d+,?{_GAP}$")


class Problem(NamedTuple):
    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


class Outcome(NamedTuple):
    """`resolved` counts the references that name a section that exists."""

    resolved: int
    problems: tuple[Problem, ...]


def check(root: Path = ROOT) -> Outcome:
    """Every reference in the files of the repository at `root`, in the order of paths and lines."""
    pages = {path.name: path.read_text(encoding="utf-8") for path in sorted((root / PAGES).glob("*.md"))}
    sections = {name: _sections(text) for name, text in pages.items()}
    resolved = 0
    problems: list[Problem] = []
    for name, numbers in sections.items():
        twice = [number for number, count in Counter(numbers.values()).items() if count > 1]
        problems += [
            Problem(PAGES / name, line, f"section {number} is there more than once")
            for line, number in numbers.items()
            if number in twice
        ]
    known = {name: frozenset(numbers.values()) for name, numbers in sections.items()}
    for path in sorted({path for pattern in CHECKED for path in root.glob(pattern) if path.is_file()}):
        relative = path.relative_to(root)
        if relative == EXAMPLES or "corpus" in relative.parts:
            continue
        text = path.read_text(encoding="utf-8")
        found = list(_references(relative, text, known))
        resolved += found.count(None)
        problems += [problem for problem in found if problem is not None]
    return Outcome(resolved, tuple(sorted(problems)))


def _sections(text: str) -> dict[int, str]:
    """The numbers of the headings by line; what looks like one in a block of code is none."""
    numbers: dict[int, str] = {}
    is_code = False
    for line, content in enumerate(text.splitlines(), 1):
        if _FENCE.match(content):
            is_code = not is_code
        elif not is_code and (heading := _HEADING.match(content)):
            numbers[line] = heading[1]
    return numbers


def _references(path: Path, text: str, known: Mapping[str, frozenset[str]]) -> Iterator[Problem | None]:
    """For each reference None if it resolves, otherwise what is wrong with it."""
    is_contract = path.parent == PAGES
    for match in _REFERENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        page = match["page"]
        if page is None and not is_contract:
            if not _RFC_BEFORE.search(text[: match.start()]):
                yield Problem(path, line, f"§{match['section']} names no page: write docs/contract/PAGE.md §N")
            continue
        if page is None and not known[path.name]:
            continue  # the index has no sections of its own: it shows what references look like
        page = page or path.name
        directory = match["directory"] or ""
        if directory.removesuffix("/") != PAGES.as_posix() and not (is_contract and not directory):
            yield Problem(path, line, f"write docs/contract/{page} instead of {directory}{page}")
            continue
        yield _resolve(path, line, page, match["section"], known)
        for number in re.findall(_NUMBER, match["more"]):
            yield _resolve(path, line, path.name if is_contract else page, number, known)
    for match in _PAGE_ALONE.finditer(text):
        if match[1] not in known:
            yield Problem(path, text.count("\n", 0, match.start()) + 1, f"there is no page docs/contract/{match[1]}")
    for match in _OLD_FORMS.finditer(text):
        if match["rfc"] is None:
            old = " ".join(match[0].split())
            line = text.count("\n", 0, match.start()) + 1
            yield Problem(path, line, f"{old!r}: write docs/contract/PAGE.md §N")


def _resolve(path: Path, line: int, page: str, number: str, known: Mapping[str, frozenset[str]]) -> Problem | None:
    if page not in known:
        return Problem(path, line, f"there is no page docs/contract/{page}")
    if number not in known[page]:
        return Problem(path, line, f"docs/contract/{page} has no section {number}")
    return None


def main() -> int:
    outcome = check()
    for problem in outcome.problems:
        print(problem)
    print(f"contract references: {outcome.resolved} resolved, {len(outcome.problems)} wrong")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
