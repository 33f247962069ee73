"""`plexd state`, `reconcile`, `reload` and `health` as programs, against the real front door."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.test_assembly import free_port
from tests.api_harness import House

PLEXD = Path(sys.executable).with_name("plexd")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tmp_path_factory.mktemp("house")) as house:
        yield house


def plexd(
    house: House, *words: str, given: bytes = b"", environ: dict[str, str] | None = None
) -> tuple[int, bytes, str]:
    """Exit code, standard output, standard error."""
    done = subprocess.run(
        [PLEXD, *words, "--socket", str(house.socket)], input=given, capture_output=True, check=False, env=environ or {}
    )
    return done.returncode, done.stdout, done.stderr.decode()


def test_summary_is_the_document_indented(house: House) -> None:
    code, out, err = plexd(house, "state")
    assert (code, err) == (0, "")
    assert out.startswith(b'{\n  "revision": ')
    assert json.loads(out)["metadata"] == {"region": "eu-1", "a/b": "slash"}
    code, out, _ = plexd(house, "state", "--json")
    assert (code, out.count(b"\n")) == (0, 1)


def test_one_entry_of_each_kind(house: House) -> None:
    assert json.loads(plexd(house, "state", "get", "metadata", "a/b")[1]) == {"key": "a/b", "value": "slash"}
    data = plexd(house, "state", "get", "data", "proxy")[1]
    assert b'    "ratio": 0.10\n' in data
    assert json.loads(data)["version"] == 4
    assert json.loads(plexd(house, "state", "get", "secret", "db-pass")[1])["value"] == "s3cr3t!"
    assert plexd(house, "state", "get", "secret", "db-pass", "--raw")[1] == b"s3cr3t!"


def test_texts_hold_nothing_that_a_terminal_would_obey(house: House) -> None:
    order = ["\x9b2J\x7f\x1b[2J", "ü"]
    given = json.dumps(order, ensure_ascii=False).encode()
    assert plexd(house, "state", "report", "orders", "--data", "-", given=given)[0] == 0
    shown = plexd(house, "state", "get", "report", "orders")[1].decode()
    assert [char for char in shown if not char.isprintable() and char != "\n"] == []
    assert json.loads(shown)["payload"] == order
    assert "ü" in shown
    assert plexd(house, "state", "report", "orders", "--delete")[0] == 0


def test_what_is_not_there_is_exit_4(house: House) -> None:
    code, out, err = plexd(house, "state", "get", "data", "nobody")
    assert (code, out, err) == (4, b"", "plexd: there is no data entry of this key\n")
    code, out, _ = plexd(house, "state", "get", "data", "nobody", "--json")
    assert (code, json.loads(out)["code"]) == (4, "not_found")


def test_report_is_written_and_deleted(house: House, tmp_path: Path) -> None:
    assert plexd(house, "state", "report", "r", "--data", '{"ratio": 0.10}')[1] == b"report r written (version 1)\n"
    assert b'"ratio": 0.10' in plexd(house, "state", "get", "report", "r")[1]
    assert plexd(house, "state", "report", "r", "--data", "-", given="é".join('""').encode())[0] == 0
    (tmp_path / "payload").write_text("[1, 2]")
    words = ("state", "report", "r", "--data", f"@{tmp_path / 'payload'}", "--content-type", "text/x", "--json")
    stored = json.loads(plexd(house, *words)[1])
    assert (stored["version"], stored["payload"], stored["content_type"]) == (3, [1, 2], "text/x")
    code, _, err = plexd(house, "state", "report", "r", "--data", "1", "--if-match", "2")
    assert (code, err) == (1, "plexd: the precondition does not hold: the current version is 3\n")
    assert plexd(house, "state", "report", "r", "--delete", "--if-match", "3")[1] == b"report r deleted\n"
    assert plexd(house, "state", "report", "r", "--delete")[0] == 4


@pytest.mark.parametrize(
    "words",
    [
        ("state", "report", "r", "--data", "done"), ("state", "report", "r"), ("state", "report", "r", "--data", ""),
        ("state", "report", "r", "--data", "1", "--delete"), ("state", "get", "metadata"), ("state", "get", "x", "y"),
        ("state", "report", "r", "--delete", "--content-type", "a/b"), ("state", "get", "data", "k", "--raw"),
        ("state", "put"), ("health", "--timeout", "soon"), ("health", "--timeout", "0s"),
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_2(house: House, words: tuple[str, ...]) -> None:
    code, out, err = plexd(house, *words)
    assert (code, out) == (2, b"")
    assert err.startswith("plexd: ")


def test_missing_file_is_said(house: House) -> None:
    code, _, err = plexd(house, "state", "report", "r", "--data", "@/nowhere")
    assert (code, err) == (1, "plexd: cannot read /nowhere: No such file or directory\n")


def test_reconcile_and_reload(house: House) -> None:
    assert plexd(house, "reconcile")[:2] == (0, b"reconciliation requested\n")
    assert json.loads(plexd(house, "reconcile", "--json")[1]) == {"status": "triggered"}
    assert house.told.reconciliations == ["local api"] * 2
    assert plexd(house, "reload")[:2] == (0, b"changed: log_level\nrestart required: api, mode\n")
    assert json.loads(plexd(house, "reload", "--json")[1])["restart_required"] == ["api", "mode"]
    house.told.problems = ("/etc/x:3: mesh: is wrong", "api: is not set")
    try:
        code, out, err = plexd(house, "reload")
    finally:
        house.told.problems = ()
    assert (code, out, err) == (1, b"", "plexd: /etc/x:3: mesh: is wrong; api: is not set\n")


def test_health_over_the_socket_and_over_its_listener(tmp_path: Path) -> None:
    listen = f"127.0.0.1:{free_port()}"
    with House(tmp_path, health={"enabled": True, "listen": listen}) as house:
        assert plexd(house, "health")[:2] == (0, b"ok\n")
        assert plexd(house, "health", "--ready", "--timeout", "10s")[:2] == (0, b"ok\n")
        house.told.reason = "registration_pending"
        assert plexd(house, "health", "--ready")[:2] == (1, b"registration_pending\n")
        assert plexd(house, "health")[0] == 0
        environ = {"PLEXD__HEALTH__ENABLED": "true", "PLEXD__HEALTH__LISTEN": listen}
        assert plexd(house, "health", "--ready", environ=environ)[:2] == (1, b"registration_pending\n")
        code, out, _ = plexd(house, "health", "--ready", "--json", environ=environ)
        assert (code, json.loads(out)) == (1, {"ok": False, "reason": "registration_pending"})
    # the listener alone is gone, then both
    code, out, _ = plexd(house, "health", environ=environ)
    assert (code, out.decode()) == (1, f"daemon not reachable at {house.socket}\n")
