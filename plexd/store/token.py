"""Bootstrap tokens that are at hand: in configuration, file, environment, in this order (docs/contract/lifecycle.md
§2.2).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from plexd.errors import RegistrationRefused
from plexd.log import get_logger

log = get_logger("registration")

MAX_TOKEN_BYTES = 512


class NoToken(RegistrationRefused):
    """No source has a token."""


@dataclass(frozen=True, slots=True)
class BootstrapToken:
    """`file` is where it was read from, to be removed once it is used up; None for the other sources."""

    value: SecretStr
    file: Path | None = None


def tokens_at_hand(value: SecretStr | None, file: Path, variable: str, in_variable: str) -> Iterator[BootstrapToken]:
    """One for each source that has any; a source is read when its turn comes. `in_variable` is what `variable` held.

    Raises RegistrationRefused when a source cannot be read or what it holds is no token.
    """
    if value is not None and (text := value.get_secret_value().strip()):
        yield BootstrapToken(check_token(text, "the configured token"))
    if text := _read_file(file):
        yield BootstrapToken(check_token(text, f"the token in {file}"), file)
    if text := in_variable.strip():
        yield BootstrapToken(check_token(text, f"the token in {variable}"))


def _read_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                log.warning("token file can be read by others", path=str(path), next_step="chmod 600")
            raw = file.read(MAX_TOKEN_BYTES + 1)
    except FileNotFoundError:
        return ""
    except OSError as exc:
        raise RegistrationRefused(f"cannot read token file {path}: {exc.strerror}") from exc
    if len(raw) > MAX_TOKEN_BYTES:
        raise RegistrationRefused(f"the token in {path} is longer than {MAX_TOKEN_BYTES} bytes: it is not a token")
    return raw.decode("utf-8", "replace").strip()


def check_token(text: str, source: str) -> SecretStr:
    """The token, trimmed. Raises RegistrationRefused, naming the source and never the value."""
    text = text.strip()
    if not text or len(text.encode()) > MAX_TOKEN_BYTES or not all(0x20 <= ord(char) <= 0x7E for char in text):
        raise RegistrationRefused(f"{source} is not a token: 1 to {MAX_TOKEN_BYTES} printable ASCII characters")
    return SecretStr(text)
