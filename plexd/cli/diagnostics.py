"""`plexd diagnostics`: everything that helps to find out what is wrong, in one archive that holds no secrets."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from plexd import __version__
from plexd.cli.asking import exchange
from plexd.config.api_socket import find_socket
from plexd.config.load import load
from plexd.config.models import Config
from plexd.config.show import as_yaml
from plexd.errors import FatalError, PlexdError
from plexd.masking import mask, register_secret
from plexd.store.identity import NODE_KEY, PRIVATE_KEY

PROGRAM_SECONDS = 20.0
LOG_LINES = "2000"
ROUTES = {
    "status.json": "/v1/status", "peers.json": "/v1/peers", "health.json": "/v1/health",
    "metrics-status.json": "/v1/metrics/status", "log-status.json": "/v1/log-status",
    "audit-status.json": "/v1/audit/status",
}  # fmt: skip


class NotWritten(FatalError):
    """The archive could not be written."""


def diagnostics(args: argparse.Namespace) -> int:
    name = f"plexd-diagnostics-{socket.gethostname()}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    path = Path(args.output) if args.output is not None else Path(f"{name}.tar.gz")
    try:
        # it holds addresses and names of the mesh: for its owner alone, and never over an existing file
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
                for entry, content in _collect(vars(args)):
                    _add(archive, f"{name}/{entry}", mask(content))
        except BaseException:
            path.unlink()  # a part of it helps nobody, and is in the way of the next try
            raise
    except OSError as exc:
        raise NotWritten(f"cannot write {path}: {exc.strerror}") from exc
    print(path)
    return 0


def _add(archive: tarfile.TarFile, name: str, content: str) -> None:
    raw = content.encode(errors="replace")
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(raw), 0o600, int(time.time())
    archive.addfile(entry, io.BytesIO(raw))


def _collect(flags: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names and contents. What cannot be had is told in its place, so that nobody wonders."""
    yield "versions.txt", _versions()
    for name, route in ROUTES.items():
        yield name, _answer(flags, route)
    config: Config | None = None
    try:
        loaded = load(flags, os.environ)
        config = loaded.config
        yield "config.yaml", as_yaml(config, loaded.origins)
    except PlexdError as exc:
        yield "config.yaml", f"# {exc}\n"
    if config is not None:
        _learn_secrets(config)
    mesh, unit = (config.mesh.interface, config.systemd.unit) if config is not None else ("plexd0", "plexd.service")
    # `wg show` hides keys; its dump would not
    for name, command in {
        "wg.txt": ("wg", "show", mesh),
        "links.txt": ("ip", "-details", "-statistics", "link"),
        "addresses.txt": ("ip", "address"),
        "routes.txt": ("ip", "route", "show", "table", "all"),
        "routes6.txt": ("ip", "-6", "route", "show", "table", "all"),
        "nftables.txt": ("nft", "list", "table", "inet", "plexd"),
        "sockets.txt": ("ss", "-tulpn"),
        "unit.txt": ("systemctl", "status", "--no-pager", "--lines=0", unit),
        "log.txt": ("journalctl", "--no-pager", "--lines", LOG_LINES, "--output", "short-iso", "--unit", unit),
    }.items():
        yield name, _said(*command)


def _learn_secrets(config: Config) -> None:
    """What other programs may have been told by accident is masked, as far as the caller may know it."""
    keys = (config.data_dir / name for name in (NODE_KEY, PRIVATE_KEY))
    for path in (config.token.file, config.node_api.http.token_file, *keys):
        with contextlib.suppress(OSError):
            if path is not None and (text := path.read_text(errors="replace").strip()):
                register_secret(text)


def _versions() -> str:
    return (
        f"plexd {__version__}\npython {sys.version}\nkernel {platform.release()} {platform.machine()}\n"
        f"time {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n"
    )


def _answer(flags: Mapping[str, str], route: str) -> str:
    """What the daemon answers, or why it does not."""
    try:
        return exchange(find_socket(flags, os.environ), "GET", route)[1]
    except PlexdError as exc:
        return f"{exc}\n"


def _said(*command: str) -> str:
    """All that a program says, and how it ended when not well."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROGRAM_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"{' '.join(command)}: {exc}\n"
    end = f"\n{' '.join(command)} ended with {done.returncode}\n" if done.returncode else ""
    return (done.stdout + done.stderr).decode(errors="replace") + end
