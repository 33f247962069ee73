"""What the door makes of a back end that does as it is told only in part; the back ends themselves are met for real."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence

import pytest

from plexd.mesh.changes import Outcome, PeerChange, PutPeer, RemovePeer
from plexd.mesh.keys import NO_PRESHARED_KEY, PrivateKey, PublicKey
from plexd.mesh.observed import Backend, Device
from tests.mesh_kernel import MeshKernel


class Stub:
    def __init__(self, fault: int) -> None:
        self.writes = 0
        self.calls: list[str] = []
        self._fault = fault

    async def dump(self) -> Device | None:
        raise NotImplementedError

    async def set_device(self, private_key: PrivateKey, listen_port: int) -> None:
        raise NotImplementedError

    async def change_peers(self, changes: Sequence[PeerChange]) -> None:
        self.calls.append("changed")

    async def renew_sessions(self, public_keys: Sequence[PublicKey], keepalive: int) -> None:
        raise NotImplementedError

    async def begin_handshakes(self) -> None:
        self.calls.append("begun")
        if self._fault:
            raise OSError(self._fault, "stub")


def apply_to(device: Stub, monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    kernel = MeshKernel("plexd0", "kernel", "wireguard-go")

    async def backend() -> Backend:
        return Backend.KERNEL

    monkeypatch.setattr(kernel.mesh, "_current_backend", backend)
    kernel.mesh._devices = {Backend.KERNEL: device}
    key = PublicKey(bytes([1] * 32))
    new = PutPeer("n_1", key, True, NO_PRESHARED_KEY, None, 25, (), ("added",))
    changed = new._replace(is_new=False, psk=None, allowed_ips=None, fields=("keepalive",))
    return asyncio.run(kernel.apply([RemovePeer(None, key), changed, new]))


def test_handshakes_begin_after_all_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Stub(fault=0)
    assert [outcome.error for outcome in apply_to(device, monkeypatch)] == [None, None, None]
    assert device.calls == ["changed", "begun"]


def test_new_peers_whose_handshakes_cannot_begin_are_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    removed, changed, new = apply_to(Stub(fault=errno.EPERM), monkeypatch)
    assert (removed.error, changed.error) == (None, None)
    assert new.error == "no permission to have the new peers shake hands: run as root or grant CAP_NET_ADMIN"
