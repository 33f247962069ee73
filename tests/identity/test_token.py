"""Where the bootstrap token comes from, and what is no token."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from plexd.config.models import Token
from plexd.errors import RegistrationRefused
from plexd.identity.enrolment import TokenSearch
from plexd.store.token import BootstrapToken, NoToken

VALUE, FILE, VARIABLE = "the-value", "the-file", "the-variable"
NAME = "PLEXD_BOOTSTRAP_TOKEN"


def find(
    path: Path, value: str | None = None, file: str | bytes | None = None, variable: str | None = None
) -> BootstrapToken:
    if file is not None:
        path.touch(0o600)
        path.write_bytes(file if isinstance(file, bytes) else file.encode())
    environ = {} if variable is None else {NAME: variable}
    # the configuration refuses a value that is no token, with the line it stands on; this is the last line of defence
    config = Token(file=path).model_copy(update={"value": None if value is None else SecretStr(value)})
    found = asyncio.run(TokenSearch(lambda: config, environ).find())
    assert NAME not in environ
    return found


def search(path: Path, environ: dict[str, str], value: str | None = None) -> TokenSearch:
    config = Token(file=path, value=None if value is None else SecretStr(value))
    return TokenSearch(lambda: config, environ)


def found(tokens: TokenSearch, *refused: str) -> str:
    return asyncio.run(tokens.find({SecretStr(text) for text in refused})).value.get_secret_value()


@pytest.mark.parametrize(
    ("value", "file", "variable", "token", "from_file"),
    [
        (VALUE, FILE, VARIABLE, VALUE, False),
        (None, FILE, VARIABLE, FILE, True),
        ("", FILE, VARIABLE, FILE, True),
        (" \t", FILE, VARIABLE, FILE, True),
        (None, None, VARIABLE, VARIABLE, False),
        (None, "", VARIABLE, VARIABLE, False),
        (None, " \n\n", VARIABLE, VARIABLE, False),
        (VALUE, None, None, VALUE, False),
        (None, f"  {FILE} \n", None, FILE, True),
        (None, None, f"\t{VARIABLE}\n", VARIABLE, False),
        (None, "two words", None, "two words", True),
        (None, "~" * 512, None, "~" * 512, True),
    ],
)
def test_first_source_with_a_value_wins(
    tmp_path: Path, value: str | None, file: str | None, variable: str | None, token: str, from_file: bool
) -> None:
    found = find(tmp_path / "token", value, file, variable)
    assert found.value.get_secret_value() == token
    assert found.file == (tmp_path / "token" if from_file else None)


NO_TOKENS = ["x" * 513, "umlaut-ü", "a\x00b", "a\x1bb", "a\tb", "a\nb", "del\x7f"]


@pytest.mark.parametrize("text", NO_TOKENS)
@pytest.mark.parametrize("source", ["value", "file", "variable"])
def test_source_with_something_else_is_an_error_and_is_not_skipped(tmp_path: Path, source: str, text: str) -> None:
    later = {"value": {"file": FILE}, "file": {"variable": VARIABLE}, "variable": {}}[source]
    with pytest.raises(RegistrationRefused) as caught:
        find(tmp_path / "token", **{source: text}, **later)
    assert text.strip()[:6] not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"x" * 513, b"x" * 512 + b"\n", b"\n" * 600, os.urandom(100_000)])
def test_file_that_holds_something_else_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(RegistrationRefused, match=str(tmp_path / "token")):
        find(tmp_path / "token", file=content, variable=VARIABLE)


def test_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "token").mkdir()
    with pytest.raises(RegistrationRefused, match="cannot read token file"):
        find(tmp_path / "token", variable=VARIABLE)


def test_without_any_every_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(NoToken) as caught:
        find(tmp_path / "token")
    for name in ("token.value", str(tmp_path / "token"), NAME):
        assert name in str(caught.value)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True), (0o666, True)])
def test_file_that_others_can_read_is_a_warning(tmp_path: Path, mode: int, warned: bool) -> None:
    path = tmp_path / "token"
    path.write_text(FILE)
    path.chmod(mode)
    with capture_logs() as lines:
        assert find(path).value.get_secret_value() == FILE
    assert [line["log_level"] for line in lines] == ["warning"] * warned
    assert FILE not in str([{k: v for k, v in line.items() if k != "path"} for line in lines])


def test_token_does_not_show_itself(tmp_path: Path) -> None:
    assert FILE not in repr(find(tmp_path / "token", file=FILE))


# --- looking again, for a node that is refused


def test_refused_token_is_passed_over_for_the_next_source(tmp_path: Path) -> None:
    (tmp_path / "token").touch(0o600)
    (tmp_path / "token").write_text(FILE)
    tokens = search(tmp_path / "token", {NAME: VARIABLE}, VALUE)
    assert found(tokens) == VALUE
    assert found(tokens, VALUE) == FILE
    assert found(tokens, VALUE, FILE) == VARIABLE
    with pytest.raises(NoToken, match="no new bootstrap token"):
        found(tokens, VALUE, FILE, VARIABLE)


def test_token_of_the_environment_is_kept_until_it_is_used(tmp_path: Path) -> None:
    environ = {NAME: VARIABLE}
    tokens = search(tmp_path / "token", environ)
    assert found(tokens) == found(tokens) == VARIABLE
    assert environ == {}
    tokens.forget(BootstrapToken(SecretStr("another")))
    assert found(tokens) == VARIABLE
    tokens.forget(BootstrapToken(SecretStr(VARIABLE)))
    with pytest.raises(NoToken):
        found(tokens)


def test_file_that_came_later_is_found(tmp_path: Path) -> None:
    tokens = search(tmp_path / "token", {})
    with pytest.raises(NoToken):
        found(tokens)
    (tmp_path / "token").touch(0o600)
    (tmp_path / "token").write_text(FILE)
    assert found(tokens) == FILE
