"""The pages for people in this repository, and the names in them that the code has to bear out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "docs" / "contract"

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


def pages() -> list[Path]:
    """Every page but those of the contract, which speak of the behaviour and not of the code."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(path for path in found if CONTRACT not in path.parents)


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of code in that language, in their order."""
    return [body for name, body in _FENCED.findall(page.read_text(encoding="utf-8")) if name == language]


def section(page: Path, heading: str) -> str:
    """The text below a heading, up to the next heading. KeyError if the page has no such heading."""
    text = page.read_text(encoding="utf-8")
    headings = list(_HEADING.finditer(text))
    for number, found in enumerate(headings):
        if found[1] == heading:
            end = headings[number + 1].start() if number + 1 < len(headings) else len(text)
            return text[found.end() : end]
    raise KeyError(heading)


def rows(text: str) -> list[list[str]]:
    """The cells of the table in a text, without its heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def is_code_name(name: str) -> bool:
    """Whether `plexd.package.module.Class.method` exists; the last parts may be missing."""
    parts = name.split(".")
    directory = ROOT
    while parts and (directory / parts[0]).is_dir():
        directory /= parts.pop(0)
    if not parts:
        return True
    module = directory / f"{parts[0]}.py"
    if module.is_file():
        parts.pop(0)
    else:
        module = directory / "__init__.py"
    body: list[ast.stmt] = _tree(module).body
    while parts:
        found = next((node for node in body if parts[0] in _names(node)), None)
        if found is None:
            return False
        parts.pop(0)
        body = found.body if isinstance(found, ast.ClassDef) else []
    return True


@cache
def _tree(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


def _names(node: ast.stmt) -> Iterator[str]:
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            yield name
        case ast.Assign(targets=targets):
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name
        case ast.ImportFrom(names=names):  # what a package offers as its own
            yield from (alias.asname or alias.name for alias in names)
