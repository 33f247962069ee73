"""The way to the control plane: certificates, proxies, connections, and why it failed (docs/contract/wire.md §1)."""

from __future__ import annotations

import ipaddress
import ssl
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from plexd.errors import ConfigError

# longer than a heartbeat interval, so that heartbeats find their connection open
KEEP_ALIVE_SECONDS = 90.0


def tls_context(ca_file: Path | None = None, *, insecure_skip_verify: bool = False) -> ssl.SSLContext:
    """TLS 1.2 or newer, verified against the system store and `ca_file`. ConfigError when the file is not usable."""
    if insecure_skip_verify:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context = ssl.create_default_context()
        if ca_file is not None:
            try:
                context.load_verify_locations(ca_file)
            except OSError as exc:  # ssl.SSLError is one
                raise ConfigError(f"tls.ca_file: {ca_file} is not a readable file of PEM certificates") from exc
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def open_transport(api: str, context: ssl.SSLContext, *, connections: int, kept_alive: int) -> httpx.AsyncHTTPTransport:
    """Connections to the origin of `api`, through the proxy of the environment if there is one. ConfigError for a
    proxy that cannot be used.

    A bare transport, not httpx's client: that would keep cookies and read .netrc, and could be told to follow
    redirects.
    """
    limits = httpx.Limits(
        max_connections=connections, max_keepalive_connections=kept_alive, keepalive_expiry=KEEP_ALIVE_SECONDS
    )
    return httpx.AsyncHTTPTransport(verify=context, trust_env=False, limits=limits, proxy=_proxy(api, context))


def _proxy(api: str, context: ssl.SSLContext) -> httpx.Proxy | None:
    parts = urlsplit(api)
    host = parts.hostname or ""
    proxies = urllib.request.getproxies_environment()
    url = proxies.get(parts.scheme, "")
    # plain HTTP is allowed to a loopback host because nobody else hears it; a proxy would
    if not url or _is_loopback(host) or _is_excepted(host, parts.netloc, proxies):
        return None
    if "://" not in url:
        url = f"http://{url}"
    variable = f"{parts.scheme.upper()}_PROXY"
    scheme = url.partition("://")[0].lower()
    if scheme not in {"http", "https"}:
        raise ConfigError(f"{variable}: {scheme} proxies are not supported; name an http:// or https:// proxy")
    try:
        proxy = httpx.Proxy(url, ssl_context=context if scheme == "https" else None)
    except httpx.InvalidURL as exc:
        raise ConfigError(f"{variable} is not the URL of a proxy") from exc
    if not proxy.url.host:
        raise ConfigError(f"{variable} names no host")
    return proxy


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_excepted(host: str, netloc: str, proxies: dict[str, str]) -> bool:
    """Whether NO_PROXY names the host: by name, domain, address or network."""
    if urllib.request.proxy_bypass(netloc, proxies):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return any(_contains(entry.strip(), address) for entry in proxies.get("no", "").split(","))


def _contains(entry: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    try:
        return address in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False


def root_cause(exc: BaseException) -> BaseException:
    """The exception a chain began with, where the reason stands; of several attempts in parallel the first."""
    while True:
        if isinstance(exc, BaseExceptionGroup):
            exc = exc.exceptions[0]
        elif inner := exc.__cause__ or exc.__context__:
            exc = inner
        else:
            return exc
