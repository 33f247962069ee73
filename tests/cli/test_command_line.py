"""The program as it is typed: output, streams and exit codes of `plexd`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from plexd import __version__

Run = Callable[..., subprocess.CompletedProcess[str]]
MINIMAL = "api: https://127.0.0.1:1\npolicy: {enabled: false}\n"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(*arguments: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PLEXD")}
        return subprocess.run(
            [Path(sys.executable).with_name("plexd"), *arguments],
            capture_output=True,
            text=True,
            check=False,
            input=stdin,
            cwd=tmp_path,
            env={**clean, "COLUMNS": "120", **environ},
            timeout=60,
        )

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(f"{MINIMAL}data_dir: {tmp_path}/data\ntoken: {{file: {tmp_path}/token}}\n")
    path.chmod(0o640)
    return path


def test_no_command_prints_help(run: Run) -> None:
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run("--help").stdout
    for command in (
        "up",
        "join",
        "down",
        "deregister",
        "status",
        "peers",
        "metrics-status",
        "log-status",
        "config",
        "lab",
    ):
        assert f"    {command} " in done.stdout


@pytest.mark.parametrize(
    "command",
    ["up", "run", "join", "down", "deregister", "status", "peers", "metrics-status", "log-status", "config",
     "config check", "config show", "lab", "lab up", "lab controlplane"],
)  # fmt: skip
def test_every_command_explains_itself(run: Run, command: str) -> None:
    for flag in ("--help", "-h"):
        done = run(*command.split(), flag)
        assert (done.returncode, done.stderr) == (0, "")
        usage, description, *_ = done.stdout.split("\n\n")
        assert usage.startswith(f"usage: plexd {'up' if command == 'run' else command} ")
        assert len(description) > 50


def test_version_is_three_lines_and_reads_no_file(run: Run) -> None:
    done = run("--version", "--config", "/none", PLEXD_CONFIG="/none")
    assert done.returncode == 0
    assert done.stdout == f"plexd version {__version__}\ncommit: none\nbuilt: unknown\n"
    assert run("config", "show", "--version").stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["fly"], "invalid choice: 'fly'", "try: plexd --help"),
        (["--fly"], "unrecognized arguments: --fly", "try: plexd --help"),
        (["up", "--fly"], "unrecognized arguments: --fly", "try: plexd"),
        (["up", "now"], "unrecognized arguments: now", "try: plexd"),
        (["up", "--conf", "x"], "unrecognized arguments: --conf x", "try: plexd"),
        (["config"], "required: COMMAND", "try: plexd config --help"),
        (["config", "burn"], "invalid choice: 'burn'", "try: plexd config --help"),
        (["--api"], "--api: expected one argument", "try: plexd --help"),
        (["lab", "up", "--nodes", "three"], "--nodes: invalid int value: 'three'", "try: plexd lab up --help"),
    ],
)
def test_wrong_usage_is_2_with_message_and_hint(run: Run, arguments: list[str], message: str, hint: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    first, second = done.stderr.splitlines()
    assert first.startswith("plexd: ")
    assert message in first
    assert second.startswith(hint)


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "plexd", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("plexd version")


def test_help_loads_no_command() -> None:
    program = (
        "import sys, contextlib, io; from plexd.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()): main([])\n"
        "heavy = {'pydantic', 'httpx', 'structlog', 'yaml', 'pyroute2', 'nacl', 'asyncio'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# config


def test_config_check_says_ok(run: Run, config: Path) -> None:
    done = run("config", "check", str(config))
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_config_check_takes_a_relative_path(run: Run, config: Path) -> None:
    assert run("config", "check", config.name).stdout == "ok\n"


def test_config_check_says_every_mistake_and_ends_with_5(run: Run, config: Path) -> None:
    config.write_text("mod: node\nlog_level: loud\n")
    done = run("config", "check", str(config))
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.splitlines() == [
        f"{config}:1: mod: is unknown; did you mean mode?",
        f"{config}:2: log_level: must be 'debug', 'info', 'warn' or 'error'",
    ]


def test_warnings_do_not_change_the_code(run: Run, config: Path) -> None:
    config.chmod(0o666)
    done = run("config", "check", str(config), PLEXD_TYPO="x")
    assert (done.returncode, done.stdout) == (0, "ok\n")
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["warning", "warning"]


def test_config_check_without_a_file_uses_the_environment(run: Run) -> None:
    if Path("/etc/plexd/config.yaml").exists():
        pytest.skip("this host has a configuration")
    done = run("config", "check", PLEXD__POLICY__ENABLED="false")
    assert (done.returncode, done.stdout) == (0, "ok\n")
    assert done.stderr == "no configuration file, using environment and defaults\n"


def test_config_show_is_yaml_of_what_is_in_force(run: Run, config: Path) -> None:
    shown = run("config", "show", "--config", str(config), PLEXD__TOKEN__VALUE="hush-4711")
    assert shown.returncode == 0
    assert "api: https://127.0.0.1:1\n" in shown.stdout
    assert "  value: '[redacted]'\n" in shown.stdout
    assert "hush" not in shown.stdout
    config.write_text(shown.stdout.replace("'[redacted]'", "null"))
    assert run("config", "check", str(config)).stdout == "ok\n"


def test_config_show_tells_where_values_came_from(run: Run, config: Path) -> None:
    done = run("--config", str(config), "config", "show", "--origin", "--log-level", "debug", PLEXD_HOSTNAME="edge-7")
    for line in (
        f"api: https://127.0.0.1:1  # {config}:1",
        "hostname: edge-7  # PLEXD_HOSTNAME",
        "log_level: debug  # --log-level",
        "  listen_port: 51820  # default",
    ):
        assert line in done.stdout.splitlines()
    as_json = json.loads(run("config", "show", "--origin", "--json", "--config", str(config)).stdout)
    assert as_json["config"]["mesh"]["listen_port"] == 51820
    assert as_json["origin"]["api"] == f"{config}:1"


@pytest.mark.parametrize("position", [0, 1, 2])
def test_global_flags_stand_anywhere(run: Run, config: Path, position: int) -> None:
    arguments = ["config", "show"]
    arguments[position:position] = ["--config", str(config), "--log-level=debug"]
    assert "log_level: debug\n" in run(*arguments).stdout


def test_flags_on_both_sides_of_the_command_add_up(run: Run, config: Path) -> None:
    done = run("--log-level", "debug", "--config", str(config), "config", "--hostname-is-no-flag")
    assert done.returncode == 2
    done = run("--log-level", "debug", "config", "--data-dir", "/srv/plexd", "show", "--config", str(config))
    assert "log_level: debug\n" in done.stdout
    assert "data_dir: /srv/plexd\n" in done.stdout


def test_reader_that_has_enough_is_no_traceback(config: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [Path(sys.executable).with_name("plexd"), "config", "show", "--config", config],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
