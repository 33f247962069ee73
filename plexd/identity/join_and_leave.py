"""Joining, leaving, taking down: what the commands do that run without a daemon (docs/contract/lifecycle.md §2.1 and
§11).
"""

from __future__ import annotations

# first, before httpx and structlog bring what nobody needs here
import plexd.runtime.slim_imports  # noqa: F401

# isort: split
import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from plexd import log as logging
from plexd.config.load import Loaded
from plexd.config.models import Config, effective_hostname
from plexd.control import ControlPlane
from plexd.converge.mesh_settings import mesh_interface_name
from plexd.errors import ConfigError, ControlError, PlexdError, PrivilegeError, Unauthenticated
from plexd.identity.enrolment import TokenSearch, describe, load_or_register, make_control_plane, make_registrar
from plexd.linux.kernel import Kernel
from plexd.linux.units import disable_unit, stop_unit
from plexd.log import get_logger
from plexd.mesh.address import format_ip
from plexd.mesh.firewall import TABLE
from plexd.store.files import DataDirectory, DirectoryLocked
from plexd.store.identity import Identity, IdentityDamaged, IdentityStore, data_dir_is_purgeable
from plexd.store.snapshot import SnapshotStore
from plexd.store.token import BootstrapToken, NoToken, check_token
from plexd.telemetry import agent_audit

log = get_logger("membership")


class Refused(PlexdError):
    """The command cannot be done now; the sentence says why and what to do. Exit code 1."""


@dataclass(frozen=True, slots=True)
class Joined:
    node_id: str
    mesh_ip: str
    already_registered: bool


@dataclass(frozen=True, slots=True)
class Left:
    """`node_id` is empty when there was no identity and only data was purged."""

    node_id: str
    purged: bool


def join(loaded: Loaded, *, token_text: str | None, ask: Callable[[], str] | None, force: bool) -> Joined:
    """Register and end. `token_text` is a token read from standard input; `ask` gets one when no source has any.

    Raises Refused when a daemon runs or the registration fails, other FatalErrors as the daemon does.
    """
    config = _set_up(loaded)
    token = BootstrapToken(check_token(token_text, "the token on standard input")) if token_text is not None else None
    try:
        directory = DataDirectory(config.data_dir)
    except DirectoryLocked as exc:
        raise Refused(str(exc)) from exc
    try:
        return asyncio.run(_join(config, directory, token, ask, force=force))
    finally:
        directory.close()


async def _join(
    config: Config,
    directory: DataDirectory,
    token: BootstrapToken | None,
    ask: Callable[[], str] | None,
    *,
    force: bool,
) -> Joined:
    identities = IdentityStore(directory)
    known = _known_identity(identities)
    if known is not None and not force:
        return Joined(known.node_id, format_ip(known.mesh_ip), already_registered=True)
    tokens = TokenSearch(lambda: config.token, os.environ)
    if token is None and ask is not None:
        try:
            token = await tokens.find()
        except NoToken:
            token = BootstrapToken(check_token(ask(), "what was typed"))
    control = make_control_plane(config)
    registrar = make_registrar(lambda: config, control, describe(config), identities, SnapshotStore(directory))
    registrar.on_granted.append(partial(_tell, config, "node_registered", "register"))
    is_granted = False

    async def note_grant(_node_id: str, _mesh_ip: bytes) -> None:
        nonlocal is_granted
        is_granted = True

    registrar.on_granted.insert(0, note_grant)
    aside = f".replaced-{int(time.time())}"
    try:
        if known is not None:
            identities.replace_aside(aside)
        identity = await load_or_register(config, identities, registrar, tokens, token)
    except BaseException:
        # from its grant on the new identity exists at the control plane, and part of it may be on disk
        if known is not None and not is_granted:
            identities.restore(aside)  # nothing new was gained, so nothing old is lost
        raise
    finally:
        await control.close()
    return Joined(identity.node_id, format_ip(identity.mesh_ip), already_registered=False)


def down(loaded: Loaded) -> list[str]:
    """Take the mesh down; the names of what was removed. Raises PrivilegeError, or Refused beside a daemon."""
    config = _set_up(loaded)
    with _stopped_daemon(config) as directory:
        identity = _known_identity(IdentityStore(directory)) if directory is not None else None
        return asyncio.run(_tear_down(config, identity))


def deregister(loaded: Loaded, *, purge: bool, force: bool) -> Left:
    """Give the node's place up. Raises Refused when the control plane does not take it and `force` is not given."""
    config = _set_up(loaded)
    if purge and (reason := data_dir_is_purgeable(config.data_dir)) is not None:
        raise Refused(f"data_dir {config.data_dir} is not purged: {reason}")
    with _stopped_daemon(config) as directory:
        identities = IdentityStore(directory) if directory is not None else None
        identity = _known_identity(identities) if identities is not None else None
        if identity is None and not purge:
            raise Refused(f"not registered: there is no identity in {config.data_dir}")
        if identity is not None:
            if not config.api:
                raise ConfigError("api: is required to deregister; set it in the file, with --api or PLEXD_API")
            asyncio.run(_give_up(config, identity, force=force))
            if not purge:
                asyncio.run(_tell(config, "node_deregistered", "deregister", identity.node_id, identity.mesh_ip))
        asyncio.run(_tear_down(config, identity))
        if purge:
            _purge(config)
        elif identities is not None:
            identities.retire(".deregistered")
    return Left(identity.node_id if identity is not None else "", purged=purge)


def _set_up(loaded: Loaded) -> Config:
    logging.set_up(loaded.config.log_level, loaded.config.log_format)
    for warning in loaded.warnings:
        log.warning("configuration warning", detail=warning)
    return loaded.config


@contextlib.contextmanager
def _stopped_daemon(config: Config) -> Iterator[DataDirectory | None]:
    """The data directory, locked, None without one; a daemon that systemd runs is stopped first."""
    if os.geteuid() != 0:
        raise PrivilegeError("this changes network interfaces: run it as root")
    if not config.data_dir.is_dir():
        yield None
        return
    try:
        directory = DataDirectory(config.data_dir, create=False)
    except DirectoryLocked:
        if not stop_unit(config.systemd.unit):
            raise Refused("stop the daemon first: plexd is running and not as the unit systemd knows") from None
        try:
            directory = DataDirectory(config.data_dir, create=False)
        except DirectoryLocked as exc:
            raise Refused(f"{config.systemd.unit} is stopped, yet {exc}") from None
    try:
        yield directory
    finally:
        directory.close()


def _known_identity(identities: IdentityStore) -> Identity | None:
    try:
        return identities.load()
    except IdentityDamaged as exc:
        log.warning("identity ignored", reason=str(exc))
        return None


async def _tear_down(config: Config, identity: Identity | None) -> list[str]:
    kernel = Kernel()
    kernel.interface(mesh_interface_name(config), config.mesh.backend, config.mesh.userspace_program)
    kernel.table(TABLE)
    try:
        key = identity.private_key if identity is not None else None
        return await kernel.tear_down(key.public() if key is not None else None)
    finally:
        await kernel.close()


async def _give_up(config: Config, identity: Identity, *, force: bool) -> None:
    control: ControlPlane = make_control_plane(config)
    control.use_identity(lambda: identity.node_id, lambda: identity.node_key, lambda _: None)
    try:
        await control.deregister()
    except Unauthenticated:
        log.warning("control plane refuses the node's key, which counts as deregistered")
    except ControlError as exc:
        if not force:
            raise Refused(f"not deregistered, nothing removed: {exc}; try again, or use --force") from exc
        log.warning("control plane not told", error=str(exc))
    finally:
        await control.close()


async def _tell(config: Config, event_type: str, action: str, node_id: str, mesh_ip: bytes) -> None:
    """For the audit trail of a daemon that runs later."""
    if not config.audit.enabled:
        return
    about = agent_audit.node(node_id, mesh_ip)
    try:
        entry = agent_audit.own_entry(effective_hostname(config), time.time(), event_type, action, about)
        await asyncio.to_thread(agent_audit.leave_for_daemon, config.data_dir, config.audit.spool_max_bytes, entry)
    except (OSError, ConfigError) as exc:
        log.warning("audit event not kept", event_type=event_type, error=str(exc))


def _purge(config: Config) -> None:
    for entry in config.data_dir.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    with contextlib.suppress(OSError):
        config.token.file.unlink()
    disable_unit(config.systemd.unit)
