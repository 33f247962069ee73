"""The control plane put together: fleet, application, listener, and the file that outlives a restart."""

from __future__ import annotations

import contextlib
import functools
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from plexd.errors import ConfigError
from plexd.lab.controlplane.admin_api import admin_application
from plexd.lab.controlplane.admin_client import Admin
from plexd.lab.controlplane.application import Application
from plexd.lab.controlplane.arrivals import Arrivals
from plexd.lab.controlplane.faults import FaultPlan
from plexd.lab.controlplane.fleet import DEFAULT_MESH, Fleet, Snapshot, fresh_snapshot
from plexd.lab.controlplane.listener import Listener, bind_tcp, bind_unix
from plexd.lab.stun import StunServer
from plexd.lab.tls import TlsPaths, make_ca
from plexd.log import get_logger
from plexd.store.files import write_whole

log = get_logger("lab")


class LabControlPlane:
    """An async context manager that serves while it is entered; afterwards `start` and `stop` take it off and on.

    Without `tls_directory` it speaks HTTP. `port` 0 takes a free one, kept over `stop` and `start`. `state_file` is
    read if it exists and written after every change. `stun` are addresses to answer STUN on; nodes tell kinds of NAT
    apart by two.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls_directory: Path | None = None,
        mesh_cidr: str = DEFAULT_MESH,
        state_file: Path | None = None,
        admin_socket: Path | None = None,
        preshared_keys: bool = True,
        stun: Sequence[tuple[str, int]] = (),
    ) -> None:
        """ConfigError when the state file, the mesh or the TLS directory can't be used."""
        self._host, self._port = host, port
        self._state_file = state_file
        self._saved = ""
        self.tls = _tls(tls_directory, host) if tls_directory is not None else None
        fleet = Fleet(_snapshot(state_file, mesh_cidr), time.time, preshared_keys=preshared_keys)
        arrivals, faults = Arrivals(), FaultPlan()
        self._application = Application(fleet, arrivals, faults, changed=self._save_or_log)
        self._listener = Listener(self._application, self._bind, self.tls)
        self.stun_servers = [StunServer(*address) for address in stun]
        self.admin = Admin(fleet, self._application, arrivals, faults, self._listener)
        self._admin_socket = admin_socket
        self._admin_listener = (
            Listener(
                admin_application(self.admin, changed=self._save_or_log), functools.partial(bind_unix, admin_socket)
            )
            if admin_socket is not None
            else None
        )

    @property
    def url(self) -> str:
        """What an agent's `api` names; known once it has listened."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self.tls else 'http'}://{host}:{self._port}"

    async def __aenter__(self) -> Self:
        self.save()
        async with contextlib.AsyncExitStack() as entered:
            # while nobody listens the kernel gives the port to no other connection
            entered.enter_context(self._bind())
            await self._listener.start()
            entered.push_async_callback(self._listener.stop)
            if self._admin_listener is not None and self._admin_socket is not None:
                await self._admin_listener.start()
                entered.callback(self._admin_socket.unlink, missing_ok=True)
                entered.push_async_callback(self._admin_listener.stop)
            for server in self.stun_servers:
                await entered.enter_async_context(server)
            self._entered = entered.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._entered.aclose()
        self.save()

    async def start(self) -> None:
        await self._listener.start()

    async def stop(self) -> None:
        await self._listener.stop()

    def save(self) -> None:
        """Writes the state file, if there is one and something changed. ConfigError when it can't be written."""
        if self._state_file is None:
            return
        text = self.admin.fleet.snapshot.model_dump_json(indent=1)
        if text != self._saved:
            try:
                write_whole(self._state_file, text.encode())
            except OSError as exc:
                raise ConfigError(
                    f"cannot write {self._state_file}: {exc.strerror}; choose another --state-file"
                ) from exc
            self._saved = text

    def _save_or_log(self) -> None:
        try:
            self.save()
        except ConfigError as exc:
            log.error("state not saved", reason=str(exc))

    def _bind(self) -> socket.socket:
        sock = bind_tcp(self._host, self._port)
        self._port = sock.getsockname()[1]
        return sock


def _tls(directory: Path, host: str) -> TlsPaths:
    try:
        return make_ca(directory, dict.fromkeys(("localhost", "127.0.0.1", "::1", host)))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot keep certificates in {directory}: {exc}; choose another --tls-dir") from exc


def _snapshot(path: Path | None, mesh_cidr: str) -> Snapshot:
    try:
        if path is not None and path.exists():
            return Snapshot.model_validate_json(path.read_bytes())
        return fresh_snapshot(mesh_cidr)
    except ValidationError:
        # its text would show what the file holds
        raise ConfigError(
            f"{path} is no state file of this version; remove it or choose another --state-file"
        ) from None
    except ValueError as exc:
        raise ConfigError(f"--mesh-cidr {mesh_cidr}: {exc}; give a network such as {DEFAULT_MESH}") from exc
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}; choose another --state-file") from exc
