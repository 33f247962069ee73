"""docs/decisions/: numbered pages of one form, each in the index."""

import re

from tests.documentation.pages import ROOT, rows

DIRECTORY = ROOT / "docs" / "decisions"
PAGES = sorted(DIRECTORY.glob("0*.md"))


def test_pages_are_numbered_without_a_gap() -> None:
    assert [int(page.name[:4]) for page in PAGES] == list(range(1, len(PAGES) + 1))
    assert len(PAGES) > 10


def test_pages_have_one_form() -> None:
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith(f"# {int(page.name[:4])}. "), page.name
        assert lines[2].startswith("Status: "), page.name
        assert [line for line in lines if line.startswith("## ")] == ["## Context", "## Decision", "## Consequences"]


def test_the_index_lists_every_page_with_its_title() -> None:
    index = rows((DIRECTORY / "README.md").read_text(encoding="utf-8"))
    listed = [re.fullmatch(r"\[(\d+)\]\(([\w-]+\.md)\) (.+)", cells[0]) for cells in index]
    titles = [page.read_text(encoding="utf-8").splitlines()[0].partition(". ")[2] for page in PAGES]
    assert [found.groups() for found in listed if found] == [
        (page.name[:4], page.name, title) for page, title in zip(PAGES, titles, strict=True)
    ]
