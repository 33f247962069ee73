"""docs/operations.md agrees with the program: exit codes, health conditions, reload."""

import configparser

from plexd import errors
from plexd.node.health import Condition
from tests.documentation.pages import ROOT, rows, section

PAGE = ROOT / "docs" / "operations.md"
USAGE = 2  # argparse's exit code


def exit_codes() -> dict[int, list[str]]:
    return {int(cells[0]): cells for cells in rows(section(PAGE, "Exit codes of `plexd up`"))}


def test_every_exit_code_of_the_daemon_is_explained() -> None:
    fatal = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FatalError)]
    assert set(exit_codes()) == {0, USAGE} | {kind.exit_code for kind in fatal}


def test_the_page_says_what_the_unit_restarts() -> None:
    unit = configparser.ConfigParser(interpolation=None, delimiters="=", strict=False)
    unit.read(ROOT / "systemd" / "plexd.service")
    prevented = {int(code) for code in unit["Service"]["RestartPreventExitStatus"].split()}
    assert {code for code, cells in exit_codes().items() if cells[2] == "no"} == prevented


def test_every_health_condition_is_explained() -> None:
    assert [cells[0].strip("`") for cells in rows(section(PAGE, "Health"))] == [
        condition.value for condition in Condition
    ]
