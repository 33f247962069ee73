"""Goes to the control plane step by step, without registering, and says at which one it fails."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from plexd.control.answer import parse_http_date
from plexd.errors import Problem

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 5.0
SKEW_SECONDS = 60.0
Addresses = Sequence[tuple[Any, ...]]  # of getaddrinfo
LARGE_BYTES = 6 << 10  # several packets of any Ethernet


def check_control_plane(api: str, context: ssl.SSLContext) -> Iterator[Problem]:
    """`api` is the base URL; each step is tried only when the one before it worked."""
    parts = urlsplit(api)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    proxy = _proxy(parts.scheme, host)
    if proxy is not None:
        host, port = proxy
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as exc:
        yield Problem("dns", f"{host} does not resolve: {exc.strerror}", "check /etc/resolv.conf, and the name in api")
        return
    try:
        _connect(addresses).close()
    except OSError as exc:
        yield Problem(
            "control_plane",
            f"nobody answers at {host} port {port}: {exc.strerror or 'no answer in time'}",
            "check firewall, routes and proxy variables, and that the control plane runs",
        )
        return
    if proxy is None:
        yield from _check_answers(addresses, parts.scheme, host, parts.path, context)


def _check_answers(
    addresses: Addresses,
    scheme: str,
    host: str,
    path: str,
    context: ssl.SSLContext,
) -> Iterator[Problem]:
    def ask(padding: int) -> str:
        """The Date of the answer."""
        sock = _connect(addresses)
        try:
            sock.settimeout(ANSWER_SECONDS)
            if scheme == "https":
                sock = context.wrap_socket(sock, server_hostname=host)
            connection = http.client.HTTPConnection(host)
            connection.sock = sock
            headers = {"X-Padding": "x" * padding} if padding else {}
            connection.request("GET", f"{path}/v1/ping", headers=headers)
            return connection.getresponse().getheader("Date", "")
        finally:
            sock.close()

    try:
        date = parse_http_date(ask(0))
    except ssl.SSLCertVerificationError as exc:
        remedy = "set tls.ca_file to the CA of the control plane; a wrong clock makes good certificates bad as well"
        yield Problem("tls", f"the certificate of {host} is not trusted: {exc.verify_message}", remedy)
        return
    except TimeoutError:
        what = "finishes no TLS handshake" if scheme == "https" else "answers no request"
        remedy = "check its log; on the way, check for a smaller MTU and for filtered ICMP"
        yield Problem("control_plane", f"{host} takes connections but {what}", remedy)
        return
    except (OSError, http.client.HTTPException) as exc:
        yield Problem("control_plane", f"{host} speaks no HTTP: {exc}", "check the scheme and the port in api")
        return
    if date is not None and abs(skew := date - time.time()) > SKEW_SECONDS:
        side = "behind" if skew > 0 else "ahead of"
        yield Problem(
            "clock",
            f"this clock is {abs(skew):.0f} s {side} the control plane's",
            "check time synchronisation: timedatectl",
        )
    try:
        ask(LARGE_BYTES)
    except TimeoutError:
        yield Problem(
            "mtu",
            f"small packets reach {host}, large ones get lost",
            "lower the MTU of the uplink, or have ICMP `fragmentation needed` let through",
        )
    except (OSError, http.client.HTTPException):
        pass  # refused for its size: it arrived


def _connect(
    addresses: Addresses,
) -> socket.socket:
    """To the first address that takes it. Raises the last OSError."""
    error = OSError("no address")
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        sock.settimeout(CONNECT_SECONDS)
        try:
            sock.connect(address)
        except OSError as exc:
            sock.close()
            error = exc
        else:
            return sock
    raise error


def _proxy(scheme: str, host: str) -> tuple[str, int] | None:
    """Where requests go instead, as the environment says."""
    url = urllib.request.getproxies().get(scheme)
    if not url or urllib.request.proxy_bypass(host):
        return None
    parts = urlsplit(url if "//" in url else f"//{url}")
    return (parts.hostname, parts.port or 80) if parts.hostname else None
