"""systemd/plexd.service agrees with the program it starts."""

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from plexd.cli.parser import parser
from plexd.config.layers import DEFAULT_PATH
from plexd.config.models import Config
from plexd.errors import (
    ConfigError,
    FatalError,
    LocalStateError,
    PrivilegeError,
    RegistrationRefused,
    RegistrationTimedOut,
)

UNIT = Path(__file__).parents[2] / "systemd" / "plexd.service"
USAGE = 2  # argparse's exit code


@pytest.fixture
def unit() -> configparser.ConfigParser:
    read = configparser.ConfigParser(interpolation=None, delimiters="=")
    read.optionxform = str  # type: ignore[assignment, method-assign]  # the documented way to keep upper case
    read.read_string(UNIT.read_text())
    return read


def test_restart_is_prevented_by_exactly_the_codes_that_a_restart_cannot_help(unit: configparser.ConfigParser) -> None:
    prevented = {int(code) for code in unit["Service"]["RestartPreventExitStatus"].split()}
    assert prevented == {USAGE} | {error.exit_code for error in (ConfigError, RegistrationRefused, LocalStateError)}
    assert not prevented & {error.exit_code for error in (FatalError, RegistrationTimedOut, PrivilegeError)}
    assert unit["Service"]["Restart"] == "always"


def test_unit_starts_the_daemon_with_the_default_file(unit: configparser.ConfigParser) -> None:
    program, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert program == "/usr/local/bin/plexd"
    args = parser().parse_args(arguments)
    assert args.runs == "plexd.cli.node:up"
    assert Path(args.config) == DEFAULT_PATH


def test_unit_keeps_the_directories_the_daemon_uses(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    assert Path("/var/lib", service["StateDirectory"]) == Config().data_dir
    assert (service["StateDirectoryMode"], service["UMask"]) == ("0700", "0077")
    assert (service["RuntimeDirectory"], service["RuntimeDirectoryPreserve"]) == ("plexd", "restart")


def test_unit_waits_for_readiness_and_watches(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    assert (service["Type"], service["NotifyAccess"], service["WatchdogSec"]) == ("notify", "main", "60s")
    assert (service["TimeoutStopSec"], service["KillMode"]) == ("75s", "mixed")


def test_unit_allows_what_the_mesh_needs_and_no_other_directive_is_in_the_way(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    assert {"CAP_NET_ADMIN", "CAP_NET_RAW"} <= set(service["CapabilityBoundingSet"].split())
    inherited_by_children = {"ProtectSystem", "ProtectHome", "PrivateTmp", "NoNewPrivileges", "RestrictNamespaces",
                             "RestrictAddressFamilies", "SystemCallArchitectures"}  # fmt: skip
    in_the_way = {"ProtectKernelTunables", "MemoryDenyWriteExecute", "ProtectControlGroups", "ReadWritePaths"}
    assert not set(service) & (inherited_by_children | in_the_way)


def test_unit_is_what_the_name_of_the_default_unit_says() -> None:
    assert Config().systemd.unit == UNIT.name


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / "plexd.service"
    copy.write_text(UNIT.read_text().replace("/usr/local/bin/plexd", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    assert "plexd.service:" not in done.stderr
