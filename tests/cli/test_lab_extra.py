"""`plexd` where the packages of the extra `lab` are not installed."""

import subprocess
import sys

import pytest

BLOCKING = """\
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
COMMAND = BLOCKING + "from plexd.cli.main import main; sys.exit(main(sys.argv[1:]))"
DAEMON = BLOCKING + "import plexd.daemon.life"


def without(missing: str, program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", program.format(missing=missing), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
@pytest.mark.parametrize("command", [["up"], ["controlplane"], ["policies"]])
def test_the_lab_names_the_extra_to_install(missing: str, command: list[str]) -> None:
    done = without(missing, COMMAND, "lab", *command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "plexd: the lab needs starlette and uvicorn, which are not installed: pip install plexd[lab]\n"
    )


def test_another_missing_module_is_not_taken_for_the_extra() -> None:
    done = without("cryptography", COMMAND, "lab", "controlplane")
    assert done.returncode == 1
    assert "plexd[lab]" not in done.stderr
    assert "ModuleNotFoundError: No module named 'cryptography'" in done.stderr


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_help_and_the_daemon_need_no_extra(missing: str) -> None:
    for program, arguments in ((COMMAND, ["lab", "up", "--help"]), (DAEMON, [])):
        done = without(missing, program, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
