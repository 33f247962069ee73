"""Looks at this host the way the daemon will need it, and says what is missing (docs/contract/operations.md §8.3 and
§15).
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from plexd.errors import Problem
from plexd.linux.netlink import Message, NetlinkSocket, attribute
from plexd.linux.wireguard.program import SEARCH_PATH, TUN

CAPABILITIES = {12: "NET_ADMIN", 13: "NET_RAW"}
NEEDED_FOR = {"NET_ADMIN": "interfaces, routes and the firewall", "NET_RAW": "STUN and pings"}
NETLINK_GENERIC = GENL_ID_CTRL = 16
CTRL_ATTR_FAMILY_NAME = 2
_GETFAMILY = bytes([3, 1, 0, 0])  # command, version, reserved
IPV6_OFF = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")
NFT_SECONDS = 10.0


def check_capabilities() -> Iterator[Problem]:
    status = Path("/proc/self/status").read_text()
    held = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff")), 16)
    for number, name in CAPABILITIES.items():
        if not held >> number & 1:
            yield Problem(
                "capabilities",
                f"CAP_{name} is missing, which {NEEDED_FOR[name]} need",
                f"run as root, or give the unit or container {name}",
            )


def check_backend(backend: str, program: str, has_kernel: bool) -> Iterator[Problem]:
    """`has_kernel`: this kernel makes WireGuard links."""
    if has_kernel and backend != "userspace":
        return
    found = shutil.which(program, path=SEARCH_PATH) is not None
    if backend == "kernel":
        yield Problem("wireguard", "this kernel has no WireGuard", "modprobe wireguard, or set mesh.backend to auto")
    elif not found:
        yield Problem(
            "wireguard",
            f"this kernel has no WireGuard, and {program} is not installed",
            f"modprobe wireguard, or install {program}",
        )
    elif not TUN.exists():
        yield Problem(
            "tun",
            f"this kernel has no WireGuard, and {TUN} is missing, which {program} needs",
            f"modprobe wireguard or tun; in a container pass the device {TUN}",
        )
    elif not os.access(TUN, os.R_OK | os.W_OK):
        yield Problem("tun", f"{TUN} cannot be opened", "allow the device to this process")


def check_firewall() -> Iterator[Problem]:
    nft = shutil.which("nft", path=SEARCH_PATH)
    if nft is None:
        yield Problem("nftables", "nft is not installed, so no policy can be enforced", "install nftables")
        return
    try:
        done = subprocess.run([nft, "list", "tables"], capture_output=True, text=True, timeout=NFT_SECONDS, check=False)
        fault = done.stderr.strip().splitlines()[:1] if done.returncode else []
    except (OSError, subprocess.TimeoutExpired) as exc:
        fault = [str(exc)]
    for line in fault:
        yield Problem("nftables", f"nft does not work here: {line}", "see that the kernel has nf_tables")


def check_ipv6() -> Iterator[Problem]:
    try:
        is_off = IPV6_OFF.read_text().strip() == "1"
    except OSError:
        is_off = True
    if is_off:
        yield Problem(
            "ipv6",
            "IPv6 is off, so mesh addresses and endpoints of that family cannot be used",
            "sysctl net.ipv6.conf.all.disable_ipv6=0, unless the mesh has IPv4 only",
        )


def check_port(port: int, interface: str) -> Iterator[Problem]:
    """A port that our own interface holds is where it should be."""
    if Path(f"/sys/class/net/{interface}").exists():
        return
    for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104 - WireGuard listens so
        try:
            with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((host, port))
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                yield Problem(
                    "port",
                    f"another program holds UDP port {port}",
                    f"ss -ulpn 'sport = :{port}' names it; stop it, or set mesh.listen_port",
                )
                return


def check_data_dir(path: Path) -> Iterator[Problem]:
    """The directory itself, or what it will be made in."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    probe = place / f".plexd-doctor-{secrets.token_hex(4)}"
    try:
        probe.touch(0o600)
        probe.unlink()
    except OSError as exc:
        yield Problem(
            "data_dir",
            f"{place} cannot be written: {exc.strerror}",
            "make it writable, or set data_dir to a directory that survives reboots",
        )


def has_kernel_wireguard() -> bool:
    """Asking for the family has the kernel load the module, if it has one."""
    request = Message(GENL_ID_CTRL, 0, _GETFAMILY + attribute(CTRL_ATTR_FAMILY_NAME, b"wireguard\0"))
    try:
        with NetlinkSocket(NETLINK_GENERIC) as asking:
            return bool(asking.get(request))
    except OSError:
        return False
