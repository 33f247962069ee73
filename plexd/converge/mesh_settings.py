"""Turns the configuration and the identity into the settings of the mesh."""

from __future__ import annotations

from plexd.config.models import Config
from plexd.linux.interface import InterfaceName
from plexd.mesh import firewall
from plexd.mesh.observed import MESH_ALIAS, MESH_SECTION, Backend
from plexd.mesh.policy import Action
from plexd.mesh.target import Settings
from plexd.store.identity import Identity


def mesh_interface_name(config: Config) -> InterfaceName:
    return InterfaceName(config.mesh.interface, MESH_ALIAS, MESH_SECTION)


def mesh_settings(config: Config, identity: Identity, control_plane: frozenset[bytes]) -> Settings | None:
    """None while the node has no private key. `control_plane` holds the control plane's own addresses."""
    if identity.private_key is None:
        return None
    mesh = config.mesh
    return Settings(
        node_id=identity.node_id,
        interface=mesh.interface,
        private_key=identity.private_key,
        mesh_ip=identity.mesh_ip,
        listen_port=mesh.listen_port,
        mtu=mesh.mtu,
        keepalive=mesh.persistent_keepalive,
        backend=None if mesh.backend == "auto" else Backend(mesh.backend),
        control_plane=control_plane,
        policy=_firewall_settings(config, identity),
    )


def _firewall_settings(config: Config, identity: Identity) -> firewall.Settings | None:
    policy = config.policy
    if not policy.enabled:
        return None
    return firewall.Settings(
        mesh_ip=identity.mesh_ip,
        interfaces=(config.mesh.interface,),
        default=Action(policy.default),
        allow_ping=policy.allow_ping,
        guard_mesh_ip=policy.guard_mesh_ip,
        log_denied=policy.log_denied,
    )
