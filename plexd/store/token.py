"""Where the bootstrap token comes from: configuration, file, environment, in this order (lifecycle contract, 2.2)."""

from __future__ import annotations

import os
import stat
from collections.abc import MutableMapping
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


def find_token(value: SecretStr | None, file: Path, variable: str, environ: MutableMapping[str, str]) -> BootstrapToken:
    """The first source that has one. The variable is removed from `environ`, so that no child sees it.

    Raises NoToken, or RegistrationRefused when a source cannot be read or what it holds is no token.
    """
    from_environment = environ.pop(variable, "")
    if value is not None and (text := value.get_secret_value().strip()):
        return BootstrapToken(check_token(text, "the configured token"))
    if text := _read_file(file):
        return BootstrapToken(check_token(text, f"the token in {file}"), file)
    if text := from_environment.strip():
        return BootstrapToken(check_token(text, f"the token in {variable}"))
    raise NoToken(
        f"no bootstrap token: looked at token.value, the file {file} and the variable {variable}; "
        f"get a token from the control plane and put it into {file}"
    )


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
