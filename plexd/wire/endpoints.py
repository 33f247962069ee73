"""The calls to the control plane as one table (docs/contract/wire.md §1.3, §2, §5, §7 and §9).

The client is driven by it, and so is the lab's server. Waiting times behind a `Retry` are the client's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from plexd.errors import WireError
from plexd.wire import models
from plexd.wire.models import Model
from plexd.wire.values import path_segment


class AnswerBody(StrEnum):
    """What the body of a 2xx answer is."""

    NOTHING = "nothing"  # whatever it holds is ignored
    JSON = "json"
    EVENT_STREAM = "event_stream"
    OCTETS = "octets"


class Credential(StrEnum):
    BOOTSTRAP_TOKEN = "bootstrap_token"  # noqa: S105 - a name, not a token
    NODE_KEY = "node_key"


class Retry(StrEnum):
    """Who tries again after a passing failure, and for how long."""

    REGISTRATION = "registration"  # standard backoff within the time configured
    STREAM = "stream"  # reconnects by the rules of the event stream
    NEXT_TIME = "next_time"  # none: the loop that calls comes round again, or the caller gets the error
    DEREGISTRATION = "deregistration"  # 3 tries, 1 s and 2 s apart
    ENDLESS = "endless"  # standard backoff without end
    ENDLESS_SLOW = "endless_slow"  # standard backoff up to 5 min, without end
    REPORT = "report"  # by the rules of report synchronisation
    ACKNOWLEDGEMENT = "acknowledgement"  # 4 tries, 1, 2 and 4 s apart
    BATCH = "batch"  # none: the pipeline keeps the batch and decides, since an answer may divide it
    ARTIFACT = "artifact"  # 3 tries, standard backoff
    CALLBACK = "callback"  # standard backoff for up to 5 min


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One call.

    `limit` is for the whole request in seconds, None where only silence ends it. `body_required`: an empty body on 2xx
    is an error rather than `{}`. `batch`: the request is an array of `request`. `extension`: the control plane may
    lack it.
    """

    name: str
    method: str
    template: str
    request: type[Model] | None = None
    response: type[Model] | None = None
    answer: AnswerBody = AnswerBody.NOTHING
    body_required: bool = False
    batch: bool = False
    limit: float | None = 30.0
    always_gzip: bool = False
    credential: Credential = Credential.NODE_KEY
    retry: Retry = Retry.NEXT_TIME
    extension: bool = False

    def path(self, **parameters: str) -> str:
        """The path below the base URL. WireError when a parameter cannot be sent (docs/contract/wire.md §1.4)."""
        segments = {}
        for name, value in parameters.items():
            try:
                segments[name] = path_segment(value)
            except ValueError as exc:
                raise WireError(f"{name} of {self.name} {exc}") from None
        return self.template.format(**segments)


_NODE = "/v1/nodes/{node_id}"

REGISTER = Endpoint(
    "register", "POST", "/v1/register", models.RegisterRequest, models.RegisterResponse, AnswerBody.JSON,
    body_required=True, credential=Credential.BOOTSTRAP_TOKEN, retry=Retry.REGISTRATION,
)  # fmt: skip
EVENTS = Endpoint("events", "GET", f"{_NODE}/events", answer=AnswerBody.EVENT_STREAM, limit=None, retry=Retry.STREAM)
HEARTBEAT = Endpoint(
    "heartbeat", "POST", f"{_NODE}/heartbeat", models.HeartbeatRequest, models.HeartbeatResponse, AnswerBody.JSON
)
DEREGISTER = Endpoint("deregister", "POST", f"{_NODE}/deregister", limit=10.0, retry=Retry.DEREGISTRATION)
ROTATE_KEYS = Endpoint(
    "keys/rotate", "POST", "/v1/keys/rotate", models.KeyRotateRequest, models.KeyRotateResponse, AnswerBody.JSON,
    body_required=True, retry=Retry.ENDLESS,
)  # fmt: skip
CAPABILITIES = Endpoint(
    "capabilities", "PUT", f"{_NODE}/capabilities", models.CapabilitiesPayload, retry=Retry.ENDLESS_SLOW
)
ENDPOINT = Endpoint(
    "endpoint", "PUT", f"{_NODE}/endpoint", models.EndpointReport, models.EndpointResponse, AnswerBody.JSON
)
STATE = Endpoint(
    "state", "GET", f"{_NODE}/state", response=models.StateResponse, answer=AnswerBody.JSON, body_required=True
)
DRIFT = Endpoint("drift", "POST", f"{_NODE}/drift", models.DriftReport)
SECRET = Endpoint(
    "secrets", "GET", f"{_NODE}/secrets/{{key}}", response=models.SecretResponse, answer=AnswerBody.JSON,
    body_required=True, limit=10.0,
)  # fmt: skip
REPORT = Endpoint("report", "POST", f"{_NODE}/report", models.ReportSyncRequest, retry=Retry.REPORT)
ACK = Endpoint(
    "ack", "POST", f"{_NODE}/executions/{{execution_id}}/ack", models.ExecutionAck, retry=Retry.ACKNOWLEDGEMENT
)
RESULT = Endpoint(
    "result", "POST", f"{_NODE}/executions/{{execution_id}}/result", models.ExecutionResult, retry=Retry.ENDLESS_SLOW
)
METRICS = Endpoint(
    "metrics", "POST", f"{_NODE}/metrics", models.MetricPoint, batch=True, always_gzip=True, retry=Retry.BATCH
)
LOGS = Endpoint("logs", "POST", f"{_NODE}/logs", models.LogEntry, batch=True, always_gzip=True, retry=Retry.BATCH)
AUDIT = Endpoint("audit", "POST", f"{_NODE}/audit", models.AuditEntry, batch=True, always_gzip=True, retry=Retry.BATCH)
ARTIFACT = Endpoint(
    "artifacts", "GET", "/v1/artifacts/plexd/{version}/{os}/{arch}", answer=AnswerBody.OCTETS, limit=600.0,
    retry=Retry.ARTIFACT,
)  # fmt: skip

ENDPOINTS = (
    REGISTER, EVENTS, HEARTBEAT, DEREGISTER, ROTATE_KEYS, CAPABILITIES, ENDPOINT, STATE, DRIFT, SECRET, REPORT, ACK,
    RESULT, METRICS, LOGS, AUDIT, ARTIFACT,
)  # fmt: skip

PING = Endpoint("ping", "GET", "/v1/ping", extension=True)
TUNNEL_READY = Endpoint(
    "tunnels/ready", "POST", f"{_NODE}/tunnels/{{session_id}}/ready", models.TunnelReady,
    retry=Retry.CALLBACK, extension=True,
)  # fmt: skip
TUNNEL_CLOSED = Endpoint(
    "tunnels/closed", "POST", f"{_NODE}/tunnels/{{session_id}}/closed", models.TunnelClosed,
    retry=Retry.CALLBACK, extension=True,
)  # fmt: skip
INTEGRITY_VIOLATION = Endpoint(
    "integrity/violations", "POST", f"{_NODE}/integrity/violations", models.IntegrityViolationReport,
    retry=Retry.CALLBACK, extension=True,
)  # fmt: skip

EXTENSIONS = (PING, TUNNEL_READY, TUNNEL_CLOSED, INTEGRITY_VIOLATION)
