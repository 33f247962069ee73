"""Links, paths, names of code, commands and keys on the pages exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from plexd.cli.commands import COMMANDS
from plexd.config.keys import KEYS
from tests.documentation.pages import CONTRACT, ROOT, blocks, is_code_name, pages

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?:plexd|tests|docs|systemd|\.ci)/[\w./-]*|[\w.-]+\.(?:lock|toml|example\.yaml)")
NAME = re.compile(r"plexd(?:\.\w+)+")
COMMAND = re.compile(r"plexd ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?")
TARGET = re.compile(r"make ([a-z][a-z-]*)")
KEY = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")
UNIT = "plexd.service"
LOCK = "plexd.lock"
PAGES = [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages()]
LINKING = [*PAGES, *(pytest.param(page, id=str(page.relative_to(ROOT))) for page in sorted(CONTRACT.glob("*.md")))]


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def code(page: Path) -> Iterator[str]:
    """What stands in the text as code, and each line of the blocks for a shell."""
    yield from CODE.findall(without_blocks(page))
    for block in blocks(page, "sh"):
        yield from block.splitlines()


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in LINK.findall(CODE.sub("", without_blocks(page))):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(file), f"{link} names no heading of {file.name}"


@pytest.mark.parametrize("page", PAGES)
def test_files_of_the_repository_that_a_page_names_exist(page: Path) -> None:
    named = [text for text in code(page) if FILE.fullmatch(text) and text != LOCK]
    assert [text for text in named if not (ROOT / text).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_names_of_code_on_a_page_exist(page: Path) -> None:
    named = [text.removesuffix("()") for text in code(page) if NAME.fullmatch(text.removesuffix("()"))]
    assert [text for text in named if text not in {UNIT, LOCK} and not is_code_name(text)] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_on_a_page_exist(page: Path) -> None:
    known = {name: command for command in COMMANDS for name in (command.name, *command.aliases)}
    for text in code(page):
        for name, second in COMMAND.findall(text):
            assert name in known, f"plexd {name} is no command"
            if known[name].commands and second:
                assert second in {command.name for command in known[name].commands}, f"plexd {name} {second}"


@pytest.mark.parametrize("page", PAGES)
def test_targets_of_make_on_a_page_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in code(page):
        assert set(TARGET.findall(text)) <= targets, text


@pytest.mark.parametrize("page", PAGES)
def test_configuration_keys_on_a_page_exist(page: Path) -> None:
    sections = {key.rpartition(".")[0] for key in KEYS} - {""}
    tops = {section.partition(".")[0] for section in sections}
    named = [text.partition(":")[0] for text in code(page) if KEY.fullmatch(text.partition(":")[0])]
    assert [key for key in named if key.partition(".")[0] in tops and key not in KEYS and key not in sections] == []


@pytest.mark.parametrize(
    "name",
    ["plexd.wire", "plexd.wire.envelope", "plexd.wire.envelope.Verifier", "plexd.wire.envelope.Verifier.verify",
     "plexd.wire.envelope.FRESHNESS", "plexd.control.ControlPlane", "plexd.errors.FatalError.exit_code"],
)  # fmt: skip
def test_a_name_that_exists_is_found(name: str) -> None:
    assert is_code_name(name)


@pytest.mark.parametrize(
    "name",
    ["plexd.wires", "plexd.wire.envelope.Verify", "plexd.wire.envelope.Verifier.check", "plexd.log.LEVELS.debug"],
)
def test_a_name_that_does_not_exist_is_not_found(name: str) -> None:
    assert not is_code_name(name)
