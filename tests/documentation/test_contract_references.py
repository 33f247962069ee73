"""References to sections of the contract: which resolve, and what is said about the others."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.documentation.contract_references import Outcome, check

MESH = """\
# Mesh

## 6. Policy

The order is that of §6.2, events are `events.md §4`.

### 6.2 Order

```
## 9. No heading, but the output of a program
```

### 6.7 Failure
"""
EVENTS = "# Events\n\n## 4. Verification\n"

Write = Callable[[str, str], Outcome]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Puts a file into a small repository with two pages of contract, and checks the whole."""

    def write(path: str, text: str) -> Outcome:
        for name, content in (("docs/contract/mesh.md", MESH), ("docs/contract/events.md", EVENTS), (path, text)):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content, encoding="utf-8")
        return check(tmp_path)

    return write


def said(outcome: Outcome) -> list[str]:
    return [str(problem) for problem in outcome.problems]


IN_THE_PAGES = 2  # references that resolve in MESH itself


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('"""Where the kernel refuses, the old table stays (docs/contract/mesh.md §6.7)."""\n', 1),
        ('"""The order of docs/contract/mesh.md §6.2, and the checks of docs/contract/events.md §4."""\n', 2),
        ("# docs/contract/mesh.md §6, §6.2 and §6.7\n", 3),
        ("# docs/contract/mesh.md §6.2 to §6.7\n", 2),
        ('"""What happens is said in docs/contract/mesh.md\n§6.7."""\n', 1),
        ("# what happens is said in docs/contract/mesh.md\n# §6.7\n", 1),
        ("# docs/contract/mesh.md is the page, docs/contract/mesh.md §6.7 the section\n", 1),
        ("IPV4 = b''  # RFC 5769, section 2.2\n", 0),
        ("IPV4 = b''  # RFC 5769 §2.2\n", 0),
    ],
)
def test_references_to_sections_that_exist_resolve(write: Write, text: str, count: int) -> None:
    assert write("plexd/mesh/policy.py", text) == Outcome(IN_THE_PAGES + count, ())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# docs/contract/mesh.md §6.8\n", "1: docs/contract/mesh.md has no section 6.8"),
        ("\n# docs/contract/mesh.md §6.2 and §6.8\n", "2: docs/contract/mesh.md has no section 6.8"),
        ("# docs/contract/mesh.md §9\n", "1: docs/contract/mesh.md has no section 9"),
        ("# docs/contract/bridge.md §1\n", "1: there is no page docs/contract/bridge.md"),
        ("# all of docs/contract/bridge.md\n", "1: there is no page docs/contract/bridge.md"),
        ("# mesh.md §6.7\n", "1: write docs/contract/mesh.md instead of mesh.md"),
        ("# contract/mesh.md §6.7\n", "1: write docs/contract/mesh.md instead of contract/mesh.md"),
        ("# as in §6.7\n", "1: §6.7 names no page: write docs/contract/PAGE.md §N"),
        ("# mesh contract, section 6.7\n", "1: 'section 6.7': write docs/contract/PAGE.md §N"),
        (
            '"""Told apart (mesh\ncontract, sections\n3 and 3.2)."""\n',
            "2: 'sections 3': write docs/contract/PAGE.md §N",
        ),
        ("# mesh contract, 6.7\n", "1: 'contract, 6.7': write docs/contract/PAGE.md §N"),
        ("# mesh.md 6.7\n", "1: 'mesh.md 6.7': write docs/contract/PAGE.md §N"),
    ],
)
def test_other_references_are_named_with_file_and_line(write: Write, text: str, problem: str) -> None:
    outcome = write("tests/mesh/test_policy.py", text)
    assert said(outcome) == [f"tests/mesh/test_policy.py:{problem}"]


def test_pages_of_the_contract_may_leave_out_the_directory_and_their_own_name(write: Write) -> None:
    text = "# Wire\n\n## 1. Errors\n\n`mesh.md §6.7`, [the checks](events.md) of events.md §4, and §1.\n"
    assert write("docs/contract/wire.md", text) == Outcome(IN_THE_PAGES + 3, ())


def test_the_index_of_the_contract_may_show_what_a_bare_reference_looks_like(write: Write) -> None:
    text = "# The contract\n\nA bare `§3.1` is a section of the same page, `mesh.md §6.7` of another.\n"
    assert write("docs/contract/README.md", text) == Outcome(IN_THE_PAGES + 1, ())


def test_wrong_references_on_pages_of_the_contract_are_found(write: Write) -> None:
    text = "# Wire\n\n## 1. Errors\n\n`mesh.md §7`, §2, see mesh.md 6.7\n"
    assert said(write("docs/contract/wire.md", text)) == [
        "docs/contract/wire.md:5: 'mesh.md 6.7': write docs/contract/PAGE.md §N",
        "docs/contract/wire.md:5: docs/contract/mesh.md has no section 7",
        "docs/contract/wire.md:5: docs/contract/wire.md has no section 2",
    ]


def test_a_page_must_not_number_two_sections_alike(write: Write) -> None:
    assert said(write("docs/contract/wire.md", "# Wire\n\n## 1. Errors\n\n## 1. Retries\n")) == [
        "docs/contract/wire.md:3: section 1 is there more than once",
        "docs/contract/wire.md:5: section 1 is there more than once",
    ]


@pytest.mark.parametrize(
    "path",
    ["plexd/mesh/plan.py", "tests/a/b/test_it.py", "docs/operations.md", "docs/decisions/0001-it.md", "README.md",
     "CHANGELOG.md", "config.example.yaml", "Makefile", "pyproject.toml", "systemd/plexd.service", ".ci/run"],
)  # fmt: skip
def test_every_kind_of_file_is_checked(write: Write, path: str) -> None:
    assert said(write(path, "# docs/contract/mesh.md §66\n")) == [f"{path}:1: docs/contract/mesh.md has no section 66"]
