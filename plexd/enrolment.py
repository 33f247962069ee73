"""How a node gets its identity: from disk, or with a bootstrap token. Shared by the daemon and `plexd join`."""

from __future__ import annotations

import asyncio
import os

from plexd import __version__
from plexd.config.models import Config, effective_hostname
from plexd.control import ControlPlane, tls_context
from plexd.errors import RegistrationRefused
from plexd.linux import host
from plexd.log import get_logger
from plexd.services.registration import Registrar
from plexd.store.identity import Identity, IdentityDamaged, IdentityStore, refuse_lost_identity
from plexd.store.snapshot import SnapshotStore
from plexd.store.token import BootstrapToken, find_token
from plexd.uplink import Enrolment, SelfDescription

log = get_logger("registration")


def describe(config: Config) -> SelfDescription:
    """Blocks while the program is hashed."""
    metadata = {"os": "linux", "arch": host.architecture(), "kernel": host.kernel_release()}
    return SelfDescription(
        hostname=effective_hostname(config),
        metadata={**metadata, **config.registration.metadata},
        version=__version__,
        checksum=host.program_checksum(),
    )


def make_control_plane(config: Config) -> ControlPlane:
    """The client, without an identity yet. Raises ConfigError for a CA file or proxy that cannot be used."""
    context = tls_context(config.tls.ca_file, insecure_skip_verify=config.tls.insecure_skip_verify)
    return ControlPlane(config.api or "", context)


async def load_or_register(
    config: Config,
    identities: IdentityStore,
    snapshots: SnapshotStore,
    control: ControlPlane,
    description: SelfDescription,
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
        if config.token.file.exists():
            log.warning("token file is not needed, the node is registered", path=str(config.token.file))
        return identity
    if token is None:
        try:
            token = find_token(config.token.value, config.token.file, config.token.env, os.environ)
        except RegistrationRefused:
            if damage:
                raise refuse_lost_identity(damage) from None
            raise
    enrolment = Enrolment(control, description, config.registration.retry_for.total_seconds())
    return await Registrar(enrolment, identities, snapshots).register(token)
