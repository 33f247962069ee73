"""Every type that travels, named as on the wire (docs/contract/wire.md §8).

Types the control plane sends have a default for every member: absent, `null` and zero value are one. Types the agent
sends have defaults only for what may be left out, so the lab can refuse an incomplete request with the same models.
Lists hold what was usable (`reading.py`); whether ids, keys and addresses make sense is asked in `mapping.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from plexd.wire.durations import parse_duration
from plexd.wire.reading import NULL, JSONText
from plexd.wire.times import to_utc

T = TypeVar("T")


class OmitEmpty:
    """Marks a member that is left out when it is None or empty; all others are always written."""


OMIT_EMPTY = OmitEmpty()
NO_SECRET = SecretStr("")


def _checked(parse: Callable[[str], object]) -> Callable[[str], str]:
    def check(text: str) -> str:
        parse(text)
        return text

    return check


def _set(text: str) -> str:
    if not text:
        raise ValueError("is not set")
    return text


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict) and None in value.values():
        return {name: member for name, member in value.items() if member is not None}
    return value


Items = Annotated[tuple[T, ...], Field(strict=False)]
Integer = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
StringMap = Annotated[Mapping[str, str], BeforeValidator(_without_nulls)]
OptionalTime = Annotated[str, AfterValidator(to_utc)]
"""RFC 3339 text, held in UTC as it is written; `""` is "not set"."""
Time = Annotated[OptionalTime, AfterValidator(_set)]
"""The same, and set."""
Duration = Annotated[str, AfterValidator(_checked(parse_duration))]
"""Go notation, never empty."""


class Model(BaseModel):
    """A JSON object; unknown members are ignored, `null` counts as absent, types are never coerced."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return _without_nulls(value)


# --- peers, policies, keys -------------------------------------------------------------------------------------------


class Peer(Model):
    id: str = ""
    public_key: str = ""
    mesh_ip: str = ""
    endpoint: str = ""
    allowed_ips: Items[str] = ()
    psk: SecretStr = NO_SECRET


class PolicyRule(Model):
    """A rule is never skipped for a wrong type: a skipped "deny" would allow.

    A member of wrong type becomes one that no rule may have, and the policy code closes up on it (docs/contract/mesh.md
    §6.1).
    """

    src: str = ""
    dst: str = ""
    port: Integer = 0
    protocol: str = ""
    action: str = ""

    @model_validator(mode="before")
    @classmethod
    def _wrong_type_is_invalid(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        members = _without_nulls(value) if isinstance(value, dict) else {}
        port = members.get("port", 0)
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
            port = -1
        texts = {name: members.get(name, "") for name in ("src", "dst", "protocol", "action")}
        for name, text in texts.items():
            if not isinstance(text, str):
                texts[name] = "invalid" if name == "protocol" else ""
        return {**texts, "port": port}


class Policy(Model):
    id: str = ""
    rules: Items[PolicyRule] = ()


class SigningKeys(Model):
    """`transition_expires` stays as received: a bad one costs the previous key, not the document."""

    current: str = ""
    previous: Annotated[str, OMIT_EMPTY] = ""
    transition_expires: Annotated[str, OMIT_EMPTY] = ""


class DataEntry(Model):
    key: str = ""
    content_type: str = ""
    payload: JSONText = NULL
    version: Integer = 0
    updated_at: OptionalTime = ""


class SecretRef(Model):
    key: str = ""
    version: Integer = 0


# --- bridge ----------------------------------------------------------------------------------------------------------


class BridgeConfig(Model):
    """`enable_nat` None: no statement."""

    access_subnets: Items[str] = ()
    enable_nat: Annotated[bool | None, OMIT_EMPTY] = None
    enable_forwarding: bool = True


class RelaySessionAssignment(Model):
    session_id: str = ""
    peer_a_id: str = ""
    peer_a_endpoint: str = ""
    peer_b_id: str = ""
    peer_b_endpoint: str = ""
    expires_at: OptionalTime = ""


class RelayConfig(Model):
    sessions: Items[RelaySessionAssignment] = ()


class UserAccessPeer(Model):
    public_key: str = ""
    allowed_ips: Items[str] = ()
    psk: Annotated[SecretStr, OMIT_EMPTY] = NO_SECRET
    label: str = ""


class UserAccessConfig(Model):
    enabled: bool = False
    interface_name: str = ""
    listen_port: Integer = 0
    peers: Items[UserAccessPeer] = ()


class IngressRule(Model):
    rule_id: str = ""
    listen_port: Integer = 0
    target_addr: str = ""
    mode: str = ""
    cert_pem: Annotated[SecretStr, OMIT_EMPTY] = NO_SECRET
    key_pem: Annotated[SecretStr, OMIT_EMPTY] = NO_SECRET


class IngressConfig(Model):
    enabled: bool = False
    rules: Items[IngressRule] = ()


class SiteToSiteTunnel(Model):
    tunnel_id: str = ""
    remote_endpoint: str = ""
    remote_public_key: str = ""
    local_subnets: Items[str] = ()
    remote_subnets: Items[str] = ()
    psk: Annotated[SecretStr, OMIT_EMPTY] = NO_SECRET
    interface_name: str = ""
    listen_port: Integer = 0


class SiteToSiteConfig(Model):
    enabled: bool = False
    tunnels: Items[SiteToSiteTunnel] = ()


# --- answers ---------------------------------------------------------------------------------------------------------


class RegisterResponse(Model):
    node_id: str = ""
    mesh_ip: str = ""
    signing_public_key: str = ""
    node_secret_key: SecretStr = NO_SECRET
    peers: Items[Peer] = ()


class HeartbeatResponse(Model):
    reconcile: bool = False
    rotate_keys: bool = False


class StateResponse(Model):
    """`peers` and `policies` are in `model_fields_set` when they were there, as a list or as `null`."""

    peers: Items[Peer] = ()
    policies: Items[Policy] = ()
    signing_keys: Annotated[SigningKeys | None, OMIT_EMPTY] = None
    metadata: Annotated[StringMap, OMIT_EMPTY] = Field(default_factory=dict)
    bridge_config: Annotated[BridgeConfig | None, OMIT_EMPTY] = None
    relay_config: Annotated[RelayConfig | None, OMIT_EMPTY] = None
    user_access_config: Annotated[UserAccessConfig | None, OMIT_EMPTY] = None
    ingress_config: Annotated[IngressConfig | None, OMIT_EMPTY] = None
    site_to_site_config: Annotated[SiteToSiteConfig | None, OMIT_EMPTY] = None
    data: Items[DataEntry] = ()
    secret_refs: Items[SecretRef] = ()

    @model_validator(mode="before")
    @classmethod
    def _null_list_is_a_statement(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            name: [] if member is None and name in {"peers", "policies"} else member for name, member in value.items()
        }


class SecretResponse(Model):
    key: str = ""
    ciphertext: SecretStr = NO_SECRET
    nonce: str = ""
    version: Integer = 0


class PeerEndpoint(Model):
    peer_id: str = ""
    endpoint: str = ""


class EndpointResponse(Model):
    peer_endpoints: Items[PeerEndpoint] = ()


class KeyRotateResponse(Model):
    updated_peers: Items[Peer] = ()


# --- capabilities, registration --------------------------------------------------------------------------------------


class BinaryInfo(Model):
    version: str
    checksum: str


class ActionParam(Model):
    name: str
    type: Literal["string", "bool", "int"]
    required: bool
    description: str


class ActionInfo(Model):
    name: str
    description: str
    parameters: Items[ActionParam]


class HookInfo(Model):
    name: str
    description: str
    source: str
    checksum: str
    parameters: Items[ActionParam]
    timeout: Duration
    sandbox: Literal["none", "namespaced", "container", "job", "job-privileged"]


class CapabilitiesPayload(Model):
    """Lists are sorted by name, so that equal sets give equal bytes."""

    binary: Annotated[BinaryInfo | None, OMIT_EMPTY] = None
    builtin_actions: Items[ActionInfo]
    hooks: Items[HookInfo]


class RegisterRequest(Model):
    token: SecretStr
    public_key: str
    hostname: Annotated[str, Field(min_length=1, max_length=253)]
    metadata: Annotated[StringMap, OMIT_EMPTY] = Field(default_factory=dict)
    capabilities: Annotated[CapabilitiesPayload | None, OMIT_EMPTY] = None


# --- heartbeat -------------------------------------------------------------------------------------------------------

NATType = Literal["none", "full_cone", "symmetric", "unknown"]


class MeshInfo(Model):
    interface: str
    peer_count: Integer
    listen_port: Integer


class NATInfo(Model):
    public_endpoint: str
    type: NATType


class BridgeInfo(Model):
    enabled: bool
    access_interface: str
    active_routes: Integer
    relay_enabled: bool
    active_relay_sessions: Integer
    ingress_enabled: bool
    active_ingress_rules: Integer
    site_to_site_enabled: bool
    active_site_to_site_tunnels: Integer


class UserAccessInfo(Model):
    enabled: bool
    interface_name: str
    peer_count: Integer
    listen_port: Integer


class IngressInfo(Model):
    enabled: bool
    rule_count: Integer
    connection_count: Integer


class SiteToSiteInfo(Model):
    enabled: bool
    tunnel_count: Integer


class HeartbeatRequest(Model):
    node_id: str
    timestamp: Time
    status: Literal["healthy", "degraded"]
    uptime: Duration
    binary_checksum: str
    mesh: Annotated[MeshInfo | None, OMIT_EMPTY] = None
    nat: Annotated[NATInfo | None, OMIT_EMPTY] = None
    bridge: Annotated[BridgeInfo | None, OMIT_EMPTY] = None
    user_access: Annotated[UserAccessInfo | None, OMIT_EMPTY] = None
    ingress: Annotated[IngressInfo | None, OMIT_EMPTY] = None
    site_to_site: Annotated[SiteToSiteInfo | None, OMIT_EMPTY] = None


# --- endpoint, keys, drift, reports ----------------------------------------------------------------------------------


class EndpointReport(Model):
    public_endpoint: str
    nat_type: NATType


class KeyRotateRequest(Model):
    node_id: str
    new_public_key: str


class DriftCorrection(Model):
    type: str
    detail: str


class DriftReport(Model):
    timestamp: Time
    corrections: Annotated[Items[DriftCorrection], Field(min_length=1)]


class ReportEntry(Model):
    key: str
    content_type: str
    payload: JSONText = NULL
    version: Annotated[Integer, Field(ge=1)]
    updated_at: Time


class ReportSyncRequest(Model):
    entries: Items[ReportEntry]
    deleted: Items[str]


# --- executions, sessions --------------------------------------------------------------------------------------------


class TriggeredBy(Model):
    """`type` is `control_plane`, `session`, `direct_access` or `local_emergency`; any other text is passed on."""

    type: str = ""
    session_id: str = ""
    user_id: str = ""
    email: str = ""


class ActionRequest(Model):
    """`parameters` are JSON values as text; `timeout` stays as received, a bad one is refused with a reason."""

    execution_id: str = ""
    action: str = ""
    parameters: Annotated[Mapping[str, JSONText], BeforeValidator(_without_nulls), OMIT_EMPTY] = Field(
        default_factory=dict
    )
    timeout: str = ""
    checksum: Annotated[str, OMIT_EMPTY] = ""
    triggered_by: Annotated[TriggeredBy | None, OMIT_EMPTY] = None
    type: Annotated[str, OMIT_EMPTY] = ""


class ExecutionAck(Model):
    execution_id: str
    status: Literal["accepted", "rejected"]
    reason: str


class ExecutionResult(Model):
    execution_id: str
    status: Literal["success", "failed", "timeout", "cancelled", "error"]
    exit_code: Integer
    stdout: str
    stderr: str
    duration: Duration
    finished_at: Time
    triggered_by: Annotated[TriggeredBy | None, OMIT_EMPTY] = None


class SSHSessionSetup(Model):
    session_id: str = ""
    target_host: str = ""
    target_port: Integer = 0
    authorized_key: str = ""
    expires_at: OptionalTime = ""
    user: Annotated[str, OMIT_EMPTY] = ""
    allowed_commands: Annotated[Items[str], OMIT_EMPTY] = ()
    session_token: Annotated[SecretStr, OMIT_EMPTY] = NO_SECRET


# --- telemetry -------------------------------------------------------------------------------------------------------


class MetricPoint(Model):
    timestamp: Time
    group: str
    peer_id: Annotated[str, OMIT_EMPTY] = ""
    data: JSONText = NULL


class LogEntry(Model):
    timestamp: Time
    source: str
    unit: str
    message: str
    severity: Literal["emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"]
    hostname: str


class AuditEntry(Model):
    timestamp: Time
    source: str
    event_type: str
    subject: JSONText = NULL
    object: JSONText = NULL
    action: str
    result: Literal["success", "failure", "unknown"]
    hostname: str
    raw: str


# --- extensions ------------------------------------------------------------------------------------------------------


class TunnelReady(Model):
    listen_addr: str
    timestamp: Time


class TunnelClosed(Model):
    reason: str
    duration: Duration
    timestamp: Time


class IntegrityViolationReport(Model):
    type: Literal["binary", "hook"]
    path: str
    expected_checksum: str
    actual_checksum: str
    detail: str
    timestamp: Time
