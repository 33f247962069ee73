"""How a node gets its identity: from disk, or with a bootstrap token. Shared by the daemon and `plexd join`."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Collection, MutableMapping
from dataclasses import replace
from pathlib import Path

from pydantic import SecretStr

from plexd import __version__
from plexd.config.models import Config, Token, effective_hostname
from plexd.control import ControlPlane, fetch_token, tls_context
from plexd.errors import RegistrationRefused
from plexd.identity.registration import Registrar
from plexd.linux import host
from plexd.log import get_logger
from plexd.node.control_calls import Enrolment, SelfDescription
from plexd.store.identity import Identity, IdentityDamaged, IdentityStore, refuse_lost_identity
from plexd.store.snapshot import SnapshotStore
from plexd.store.token import BootstrapToken, NoToken, check_token, tokens_at_hand

log = get_logger("registration")


def describe(config: Config) -> SelfDescription:
    """Blocks while the program is hashed."""
    return SelfDescription(
        hostname=effective_hostname(config),
        metadata=_metadata(config),
        version=__version__,
        checksum=host.program_checksum(),
    )


def make_control_plane(config: Config) -> ControlPlane:
    """The client, without an identity yet. Raises ConfigError for a CA file or proxy that cannot be used."""
    return ControlPlane(config.api or "", make_tls_context(config))


def make_tls_context(config: Config) -> ssl.SSLContext:
    """Raises ConfigError for a CA file that cannot be used."""
    return tls_context(config.tls.ca_file, insecure_skip_verify=config.tls.insecure_skip_verify)


def _metadata(config: Config) -> dict[str, str]:
    metadata = {"os": "linux", "arch": host.architecture(), "kernel": host.kernel_release()}
    return {**metadata, **config.registration.metadata}


def make_registrar(
    config: Callable[[], Config],
    control: ControlPlane,
    description: SelfDescription,
    identities: IdentityStore,
    snapshots: SnapshotStore,
) -> Registrar:
    """`config` is asked at each registration: it may have been read again meanwhile."""
    enrolment = Enrolment(
        control,
        lambda: replace(description, metadata=_metadata(config())),
        lambda: config().registration.retry_for,
    )
    return Registrar(enrolment, identities, snapshots)


class TokenSearch:
    """Looks for a bootstrap token; without the prompt, which only `plexd join` has. `config` is asked each time."""

    def __init__(self, config: Callable[[], Token], environ: MutableMapping[str, str]) -> None:
        self._config = config
        self._environ = environ
        self._in_variable = ""

    async def find(self, refused: Collection[SecretStr] = ()) -> BootstrapToken:
        """The first source's that has one not in `refused`. The variable leaves the environment: no child sees it.

        Raises NoToken, or RegistrationRefused when a source cannot be read or what it holds is no token.
        """
        config = self._config()
        self._in_variable = self._environ.pop(config.env, "") or self._in_variable
        for token in tokens_at_hand(config.value, config.file, config.env, self._in_variable):
            if token.value not in refused:
                return token
        places = f"token.value, the file {config.file} and the variable {config.env}"
        if config.metadata.enabled:
            places += f" and the metadata service ({config.metadata.base_url}{config.metadata.path})"
            if text := await fetch_token(config.metadata):
                token = BootstrapToken(check_token(text, "what the metadata service answers"))
                if token.value not in refused:
                    return token
        raise NoToken(
            f"no {'new ' if refused else ''}bootstrap token: looked at {places}; "
            f"get a token from the control plane and put it into {config.file}"
        )

    def forget(self, token: BootstrapToken) -> None:
        """It is used up, and what came from the environment is nowhere else."""
        if self._in_variable.strip() == token.value.get_secret_value():
            self._in_variable = ""


async def load_or_register(
    config: Config,
    identities: IdentityStore,
    registrar: Registrar,
    tokens: TokenSearch,
    token: BootstrapToken | None = None,
) -> Identity:
    """The identity on disk; without one, the node is registered with `token` or one that is found.

    With a complete identity no call is made and no token is touched. Raises FatalError of the right kind.
    """
    damage = ""
    try:
        identity = await asyncio.to_thread(identities.load)
    except IdentityDamaged as exc:
        identity, damage = None, str(exc)
    if identity is not None:
        await asyncio.to_thread(_say_if_unused, config.token.file)
        return identity
    if token is None:
        try:
            token = await tokens.find()
        except RegistrationRefused:
            if damage:
                raise refuse_lost_identity(damage) from None
            raise
    identity = await registrar.register(token)
    tokens.forget(token)
    return identity


def _say_if_unused(file: Path) -> None:
    try:
        is_there = file.exists()
    except OSError as exc:
        log.warning("token file cannot be looked at, nor is it needed", path=str(file), reason=exc.strerror)
    else:
        if is_there:
            log.warning("token file is not needed, the node is registered", path=str(file))
