"""docs/architecture.md: the picture is that of the import contracts, the table that of the packages."""

import tomllib

from tests.documentation.pages import ROOT, rows, section

PAGE = ROOT / "docs" / "architecture.md"


def picture() -> list[set[str]]:
    """The layers from the top, as the page draws them."""
    lines = [line for line in section(PAGE, "Layers").splitlines() if line.startswith("│")]
    return [{name.strip() for name in line.split("│")[1].split("|")} for line in lines]


def contract() -> list[set[str]]:
    """The layers from the top, as `make check` proves them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = next(
        contract["layers"]
        for contract in settings["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers" and "plexd.cli" in contract["layers"]
    )
    return [{name.strip().removeprefix("plexd.") for name in layer.split("|")} for layer in layers]


def test_the_picture_shows_the_layers_of_the_import_contracts() -> None:
    assert picture() == contract()


def packages() -> set[str]:
    directories = {f"plexd/{path.parent.name}/" for path in (ROOT / "plexd").glob("*/__init__.py")}
    modules = {f"plexd/{path.name}" for path in (ROOT / "plexd").glob("[a-z]*.py")}
    return directories | modules


def test_the_table_lists_every_package_once() -> None:
    named = [cells[0].strip("`") for cells in rows(section(PAGE, "Packages"))]
    assert sorted(named) == sorted(packages())


def test_every_package_has_its_layer() -> None:
    layers = set.union(*contract())
    assert {name.removeprefix("plexd/").removesuffix("/").removesuffix(".py") for name in packages()} == layers


def test_readme_lists_every_package() -> None:
    text = section(ROOT / "README.md", "Packages")
    assert {name for name in packages() if name.endswith("/") and f"`{name}`" not in text} == set()
