"""Everything that can be set, one frozen model for each subject, with the default and what is accepted.

Only keys that do something exist. A duration is a timedelta, a path is absolute; texts arrive here as texts and
numbers as numbers, `plexd.config.document` and `plexd.config.load` see to that. Messages are the end of the sentence
"<key> ...". What every key means is written down in config.example.yaml.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
)
from pydantic_core.core_schema import ValidationInfo

from plexd.audit.types import type_number
from plexd.config.paths import DEFAULT_SOCKET, absolute_path, socket_path, split_listen
from plexd.errors import ConfigError
from plexd.mesh.address import Endpoint, parse_endpoint
from plexd.wire.durations import format_duration, parse_duration

MAX_METADATA_ENTRIES = 64
MAX_TOKEN_BYTES = 512


def _duration(value: str | timedelta) -> timedelta:
    if not isinstance(value, str):
        return value
    try:
        return timedelta(seconds=parse_duration(value))
    except ValueError as exc:
        raise ValueError(f"{exc}; write it as 90s, 1m30s or 250ms") from exc


def _at_least(seconds: int) -> AfterValidator:
    def check(value: timedelta) -> timedelta:
        if value < timedelta(seconds=seconds):
            raise ValueError(f"must be at least {format_duration(seconds)}")
        return value

    return AfterValidator(check)


def _is_a_timeout(value: timedelta) -> timedelta:
    if not timedelta() < value <= timedelta(seconds=30):
        raise ValueError("must be more than 0 and at most 30s")
    return value


def _is_a_debounce(value: timedelta) -> timedelta:
    if not timedelta(milliseconds=100) <= value <= timedelta(minutes=5):
        raise ValueError("must be between 100ms and 5m")
    return value


def _is_positive(value: timedelta) -> timedelta:
    if not value:
        raise ValueError("must be more than 0")
    return value


def _is_a_request_timeout(value: timedelta) -> timedelta:
    if not timedelta(milliseconds=100) <= value <= timedelta(seconds=30):
        raise ValueError("must be between 100ms and 30s")
    return value


def _matching(pattern: str, meaning: str) -> AfterValidator:
    compiled = re.compile(pattern, re.ASCII)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(f"must be {meaning}")
        return value

    return AfterValidator(check)


SIZE = "size"  # marks a number of bytes
MOST_BYTES = 1024 << 30  # more than any host holds, and short enough to be read again as it is shown
SIZE_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def _size(value: str | int) -> int:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9]{1,15}) ?([A-Za-z]*)", value.strip(), re.ASCII)
    if match is None or match[2] not in SIZE_UNITS:
        raise ValueError("must be a number of bytes, or one with its unit, such as 64KiB or 1MiB")
    size = int(match[1]) * SIZE_UNITS[match[2]]
    if size > MOST_BYTES:
        raise ValueError(f"must be {_in_units(MOST_BYTES)} or less")
    return size


def _size_between(least: int, most: int | None = None) -> AfterValidator:
    def check(value: int) -> int:
        if value < least or (most is not None and value > most):
            raise ValueError(f"must be {_in_units(least)}" + (f" to {_in_units(most)}" if most else " or more"))
        return value

    return AfterValidator(check)


def _in_units(size: int) -> str:
    for unit in ("GiB", "MiB", "KiB"):
        if size % SIZE_UNITS[unit] == 0:
            return f"{size // SIZE_UNITS[unit]}{unit}"
    return str(size)


Duration = Annotated[timedelta, BeforeValidator(_duration)]
AbsolutePath = Annotated[Path, BeforeValidator(absolute_path)]
Port = Annotated[int, Field(ge=1, le=65535)]
Size = Annotated[int, BeforeValidator(_size), SIZE]
AutoOrBool = Literal["auto"] | bool


class Subject(BaseModel):
    """What all of them have in common."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        hide_input_in_errors=True,
        validate_default=True,  # another key may make it impossible
    )


class Tls(Subject):
    ca_file: AbsolutePath | None = None
    insecure_skip_verify: bool = False


def check_url(url: str) -> str:
    """The base URL without trailing slashes; ValueError unless it is one of http or https."""
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("must be a URL of printable ASCII characters without spaces")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise ValueError("must be a URL with a host and, where needed, a port") from exc
    if parts.scheme not in {"http", "https"} or not host:
        raise ValueError("must be an absolute URL such as https://cp.example.net")
    if port == 0:
        raise ValueError("must have a port between 1 and 65535")
    if "?" in url or "#" in url or "@" in parts.netloc:
        raise ValueError("must have no query, fragment or user name")
    return url.rstrip("/")


def _is_link_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_link_local
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback


HeaderName = Annotated[str, _matching(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}", "the name of an HTTP header")]
HeaderValue = Annotated[str, _matching(r"[!-~](?:[ -~]{0,1022}[!-~])?", "1 to 1024 printable ASCII characters")]


class TokenMetadata(Subject):
    enabled: bool = False
    base_url: str = "http://169.254.169.254"
    path: Annotated[str, _matching(r"/[!\"$-~]{0,1023}", "a path such as /plexd/bootstrap-token")] = (
        "/plexd/bootstrap-token"
    )
    headers: dict[HeaderName, HeaderValue] = Field(default={}, max_length=16, repr=False)  # may hold a secret
    session: bool = True
    base64: bool = False
    timeout: Annotated[Duration, AfterValidator(_is_a_request_timeout)] = timedelta(seconds=2)
    wait: Annotated[Duration, _at_least(0)] = timedelta(seconds=30)

    @field_validator("base_url")
    @classmethod
    def _is_at_hand(cls, value: str) -> str:
        """Whoever answers there decides which control plane's token the node sends: nobody far away may."""
        url = check_url(value)
        host = urlsplit(url).hostname or ""
        if host != "metadata.google.internal" and not _is_loopback(host) and not _is_link_local(host):
            raise ValueError("must name a link-local or loopback address, or metadata.google.internal")
        return url


class Token(Subject):
    value: SecretStr | None = None
    file: AbsolutePath = Path("/etc/plexd/bootstrap-token")
    env: Annotated[str, _matching(r"[A-Za-z_][A-Za-z0-9_]{0,254}", "the name of an environment variable")] = (
        "PLEXD_BOOTSTRAP_TOKEN"
    )
    metadata: TokenMetadata = TokenMetadata()

    @field_validator("value")
    @classmethod
    def _is_a_token(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None or not (text := value.get_secret_value().strip()):
            return None  # nothing there: the next source is asked
        if len(text.encode()) > MAX_TOKEN_BYTES or not all(0x20 <= ord(char) <= 0x7E for char in text):
            raise ValueError(f"must be 1 to {MAX_TOKEN_BYTES} printable ASCII characters")
        return SecretStr(text)


class Registration(Subject):
    metadata: dict[Annotated[str, Field(min_length=1, max_length=63)], Annotated[str, Field(max_length=1024)]] = Field(
        default={}, max_length=MAX_METADATA_ENTRIES
    )
    retry_for: Annotated[Duration, _at_least(10)] = timedelta(minutes=5)


class Heartbeat(Subject):
    interval: Annotated[Duration, _at_least(5)] = timedelta(seconds=30)


class Reconcile(Subject):
    interval: Annotated[Duration, _at_least(1)] = timedelta(seconds=60)


class Systemd(Subject):
    # no leading dash: it becomes an argument of systemctl
    unit: Annotated[str, _matching(r"[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]{0,254}", "the name of a systemd unit")] = (
        "plexd.service"
    )


class Mesh(Subject):
    interface: Annotated[str, _matching(r"[A-Za-z0-9_-]{1,15}", "1 to 15 letters, digits, dashes or underscores")] = (
        "plexd0"
    )
    listen_port: Port = 51820
    mtu: int = 0
    persistent_keepalive: Annotated[int, Field(ge=0, le=65535)] = 25
    backend: Literal["auto", "kernel", "userspace"] = "auto"
    userspace_program: Annotated[str, _matching(r"/[!-~]+|[!-.0-~]+", "the name of a program or an absolute path")] = (
        "wireguard-go"
    )
    keep_on_stop: bool = True

    @field_validator("mtu")
    @classmethod
    def _is_an_mtu(cls, value: int) -> int:
        if value != 0 and not 1280 <= value <= 9216:
            raise ValueError("must be 0 (derived from the routes to the peers) or 1280 to 9216")
        return value


class Policy(Subject):
    enabled: bool = True
    default: Literal["deny", "allow"] = "deny"
    log_denied: bool = True
    allow_ping: bool = True
    guard_mesh_ip: bool = True


def _server(value: str) -> str:
    try:
        parse_endpoint(value)
    except ValueError:
        raise ValueError("must be host:port, ip:port or [ipv6]:port") from None
    return value


class NatTraversal(Subject):
    enabled: bool = True
    stun_servers: tuple[Annotated[str, AfterValidator(_server)], ...] = (
        "stun.l.google.com:19302",
        "stun.cloudflare.com:3478",
    )
    refresh_interval: Annotated[Duration, _at_least(10)] = timedelta(seconds=60)
    timeout: Annotated[Duration, AfterValidator(_is_a_timeout)] = timedelta(seconds=5)
    fallback: Literal["relay", "none"] = "relay"
    public_endpoint: str = ""

    @field_validator("stun_servers")
    @classmethod
    def _are_there(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not value and info.data.get("enabled", True):
            raise ValueError("must name at least one server, unless nat_traversal.enabled is false")
        return value

    @field_validator("public_endpoint")
    @classmethod
    def _is_an_endpoint(cls, value: str) -> str:
        try:
            usable = not value or isinstance(parse_endpoint(value), Endpoint)
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("must be ip:port or [ipv6]:port")
        return value


def _listen(value: str) -> str:
    split_listen(value)
    return value


Listen = Annotated[str, AfterValidator(_listen)]


class Http(Subject):
    """`enabled` stands last: its check needs the others."""

    listen: Listen = "127.0.0.1:9100"
    allow_remote: bool = False
    token_file: AbsolutePath | None = None
    secrets: bool = False
    allowed_hosts: tuple[str, ...] = ()
    enabled: bool = False

    @field_validator("enabled")
    @classmethod
    def _is_guarded(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("token_file", ...) is None:
            raise ValueError("needs node_api.http.token_file, the file with the token that callers show")
        if value and not info.data.get("allow_remote", True):
            host, _ = split_listen(info.data.get("listen", "127.0.0.1:9100"))
            if not _is_loopback(host):
                raise ValueError("needs node_api.http.allow_remote, or an address on 127.0.0.1 to listen on")
        return value


class Health(Subject):
    enabled: bool = False
    listen: Listen = "127.0.0.1:9101"


class NodeApi(Subject):
    enabled: bool = True
    socket: Annotated[Path, BeforeValidator(socket_path)] = DEFAULT_SOCKET
    debounce: Annotated[Duration, AfterValidator(_is_a_debounce)] = timedelta(seconds=5)
    shutdown_timeout: Annotated[Duration, AfterValidator(_is_positive)] = timedelta(seconds=5)

    http: Http = Http()


class Pipeline(Subject):
    """What metrics, logs and audit have in common (docs/contract/telemetry.md §2.2)."""

    enabled: bool = True
    interval: Annotated[Duration, _at_least(1)] = timedelta(seconds=5)
    batch_interval: Annotated[Duration, _at_least(1)] = timedelta(seconds=10)
    batch_max_size: Annotated[int, Field(ge=1, le=10_000)] = 500
    max_batch_bytes: Annotated[Size, _size_between(64 << 10, 8 << 20)] = 1 << 20
    buffer_size: int = 10_000
    buffer_bytes: Size = 16 << 20

    @field_validator("buffer_size")
    @classmethod
    def _holds_two_batches(cls, value: int, info: ValidationInfo) -> int:
        if value < 2 * info.data.get("batch_max_size", 1):
            raise ValueError("must be at least twice batch_max_size")
        return value

    @field_validator("buffer_bytes")
    @classmethod
    def _holds_the_bytes_of_two_batches(cls, value: int, info: ValidationInfo) -> int:
        if value < 2 * info.data.get("max_batch_bytes", 1):
            raise ValueError("must be at least twice max_batch_bytes")
        return value


class Observe(Pipeline):
    interval: Annotated[Duration, _at_least(5)] = timedelta(seconds=15)
    batch_interval: Annotated[Duration, _at_least(1)] = timedelta(seconds=60)
    buffer_size: int = 20_000
    metrics: tuple[Literal["system", "tunnel", "latency", "agent"], ...] = ("system", "tunnel", "latency", "agent")
    disk_path: AbsolutePath = Path("/")
    network_interfaces: tuple[str, ...] = ()
    handshake_stale_after: Annotated[Duration, _at_least(1)] = timedelta(minutes=5)
    latency_probes: Annotated[int, Field(ge=1, le=10)] = 3
    latency_max_peers: Annotated[int, Field(ge=1, le=1024)] = 64

    @field_validator("batch_interval")
    @classmethod
    def _is_no_shorter_than_a_cycle(cls, value: timedelta, info: ValidationInfo) -> timedelta:
        if value < info.data.get("interval", timedelta()):
            raise ValueError("must be at least observe.interval")
        return value


def _path_or_empty(value: str) -> str:
    return str(absolute_path(value)) if value else ""


def _record_type(value: str) -> str:
    if type_number(value) is None:
        raise ValueError("must be the name of a type of audit record, such as TTY or USER_CMD")
    return value


class Auditd(Subject):
    enabled: bool = True
    method: Literal["auto", "netlink", "file"] = "auto"
    log_path: AbsolutePath = Path("/var/log/audit/audit.log")
    backfill: bool = True
    exclude_types: tuple[Annotated[str, AfterValidator(_record_type)], ...] = ("TTY", "USER_TTY")


class KubernetesAudit(Subject):
    enabled: AutoOrBool = "auto"
    log_path: Annotated[str, AfterValidator(_path_or_empty)] = ""
    stages: tuple[Literal["RequestReceived", "ResponseStarted", "ResponseComplete", "Panic"], ...] = (
        "ResponseComplete",
        "Panic",
    )
    exclude_verbs: tuple[str, ...] = ()
    exclude_users: tuple[str, ...] = ()
    strip_bodies: bool = True


class Audit(Pipeline):
    spool_max_bytes: Annotated[Size, _size_between(4 << 20)] = 64 << 20
    max_raw_size: Annotated[Size, _size_between(1 << 10, 1 << 20)] = 64 << 10
    auditd: Auditd = Auditd()
    kubernetes: KubernetesAudit = KubernetesAudit()


SEVERITIES = (
    "emerg", "alert", "crit", "err", "warning", "notice", "info", "debug",
    "emergency", "panic", "critical", "error", "warn", "informational",
)  # fmt: skip


class LogFilter(Subject):
    min_severity: str = ""
    include_units: tuple[str, ...] = ()
    exclude_units: tuple[str, ...] = ()

    @field_validator("min_severity")
    @classmethod
    def _is_a_severity(cls, value: str) -> str:
        if value and value.lower() not in SEVERITIES:
            raise ValueError(f"must be one of {', '.join(SEVERITIES[:8])}")
        return value.lower()


class Journald(Subject):
    enabled: bool = True
    directory: str = ""

    @field_validator("directory")
    @classmethod
    def _is_absolute(cls, value: str) -> str:
        return str(absolute_path(value)) if value else ""


def _absolute_glob(value: str) -> str:
    if not value.startswith("/") or not value.isprintable():
        raise ValueError("must be an absolute path, with wildcards where needed")
    return value


class Logs(Pipeline):
    batch_max_size: Annotated[int, Field(ge=1, le=10_000)] = 1000
    max_line_size: Annotated[Size, _size_between(256, 1 << 20)] = 16384
    initial_lookback: Duration = timedelta(seconds=60)
    start_at: Literal["end", "beginning"] = "end"
    journald: Journald = Journald()
    file_patterns: tuple[Annotated[str, AfterValidator(_absolute_glob)], ...] = ()
    filter: LogFilter = LogFilter()


class Config(Subject):
    """The whole configuration. `tls` stands before `api`, whose check needs it."""

    tls: Tls = Tls()
    api: str | None = None
    mode: Literal["node", "bridge"] = "node"
    log_level: Literal["debug", "info", "warn", "error"] = "info"
    log_format: Literal["auto", "console", "json", "journal"] = "auto"
    data_dir: AbsolutePath = Path("/var/lib/plexd")
    hostname: str | None = None
    token: Token = Token()
    registration: Registration = Registration()
    deregister_on_shutdown: bool = False
    heartbeat: Heartbeat = Heartbeat()
    reconcile: Reconcile = Reconcile()
    systemd: Systemd = Systemd()
    mesh: Mesh = Mesh()
    policy: Policy = Policy()
    nat_traversal: NatTraversal = NatTraversal()
    node_api: NodeApi = NodeApi()
    observe: Observe = Observe()
    health: Health = Health()
    audit: Audit = Audit()
    logs: Logs = Logs()

    @field_validator("api")
    @classmethod
    def _is_a_control_plane(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        tls = info.data.get("tls", Tls())
        return check_api(value, plain_allowed=tls.insecure_skip_verify)

    @field_validator("mode")
    @classmethod
    def _is_built(cls, value: str) -> str:
        if value == "bridge":
            raise ValueError("must be node: bridge mode is not built yet in this version")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _long_form(cls, value: str) -> str:
        return "warn" if value == "warning" else value

    @field_validator("data_dir")
    @classmethod
    def _is_deep_enough(cls, value: Path) -> Path:
        if len(value.parts) < 3:
            raise ValueError("must have at least two components, such as /var/lib/plexd")
        return value

    @field_validator("hostname")
    @classmethod
    def _is_a_host_name(cls, value: str | None) -> str | None:
        return None if value is None else check_hostname(value)

    @field_validator("health")
    @classmethod
    def _is_elsewhere(cls, value: Health, info: ValidationInfo) -> Health:
        api = info.data.get("node_api", NodeApi())
        if value.enabled and api.enabled and api.http.enabled and api.http.listen == value.listen:
            raise ValueError("must not listen where node_api.http listens")
        return value


def check_api(url: str, *, plain_allowed: bool) -> str:
    """The base URL without trailing slashes; ValueError unless it is one (docs/contract/wire.md §1)."""
    base = check_url(url)
    parts = urlsplit(base)
    if parts.scheme == "http" and not plain_allowed and not _is_loopback(parts.hostname or ""):
        raise ValueError("must be https:// unless the host is loopback or tls.insecure_skip_verify is set")
    return base


def check_hostname(text: str) -> str:
    """The name, trimmed; ValueError unless the control plane accepts it (docs/contract/lifecycle.md §2.4)."""
    name = text.strip()
    if not 1 <= len(name) <= 253 or any(char.isspace() or not char.isprintable() for char in name):
        raise ValueError("must be 1 to 253 characters without white space or control characters")
    return name


def effective_hostname(config: Config) -> str:
    """The configured host name, else the kernel's. Raises ConfigError when that one cannot be used."""
    if config.hostname is not None:
        return config.hostname
    try:
        return check_hostname(socket.gethostname())
    except ValueError as exc:
        raise ConfigError(f"hostname: the host's own name {exc}; set hostname") from exc
