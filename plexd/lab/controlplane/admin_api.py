"""The admin object over HTTP, for a Unix socket: JSON in, JSON out, errors as `{"error": reason}`.

GET    /nodes                      all nodes; /nodes/{node} one of them, {node} being an id or a host name
DELETE /nodes/{node}               as if it had deregistered
POST   /nodes/{node}/revoke        its key is refused with 401; /restore takes that back
GET    /nodes/{node}/state         what a state pull answers
PATCH  /nodes/{node}/state         {"members": {…}, "notify": false}; a member of null is derived again
PUT    /nodes/{node}/data/{key}    {"payload": …, "content_type": "application/json"}
PUT    /nodes/{node}/secrets/{key} {"value": "…"}
POST   /nodes/{node}/flags         {"reconcile": true, "rotate_keys": false} with its next heartbeat
POST   /nodes/{node}/events        {"event_type", "payload"} and, to forge, "payload_text", "signer" (current,
                                   previous, stranger, nobody), "event_id", "nonce", "issued_at", "size"
POST   /nodes/{node}/stream        {"raw": "…"} or {"raw_base64": "…"} onto its stream; {"end": true} closes it
PUT    /stream                     {"keepalive_seconds", "retry_milliseconds"}
GET    /policies                   the policies of all nodes; PUT {"policies": […]} replaces them
POST   /signing-keys/rotate        {"transition_seconds": 86400}
POST   /tokens                     {"value"?, "lifetime_seconds"?}; answers {"token"}
PUT    /artifacts/{version}/{arch} the program, as octets
GET    /nodes/{node}/telemetry/{pipeline}   what was taken of metrics, logs or audit
POST   /nodes/{node}/telemetry/follow       {"pattern", "expected": {source: count}}: whether log lines that somebody
                                   numbered from 0 are complete and in order; `pattern` has the groups source, number
GET    /arrivals                   ?endpoint=&node=&after=; what reached the control plane
POST   /arrivals/wait              {"endpoint", "node", "count", "after", "contains", "timeout_seconds"}; answers
                                   when they are there, 408 when time is up; `contains`: members of the body
GET    /faults                     what is still to come; DELETE clears
POST   /faults                     {"endpoint", "node_id", "count", "delay_seconds", "effect", "status", "headers",
                                   "body", "size", "contains", "larger_than"}; effects: status, body, none,
                                   truncate, cut, disconnect, end, oversized, gzip_bomb
POST   /listener/stop              the control plane is gone; /listener/start brings it back
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, JsonValue, PositiveInt, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from plexd.lab.controlplane.admin_client import Admin
from plexd.lab.controlplane.arrivals import Arrival
from plexd.lab.controlplane.faults import Fault
from plexd.lab.controlplane.fleet import Signer
from plexd.lab.controlplane.refusal import Refusal

BodyT = TypeVar("BodyT", bound=BaseModel)


class _Order(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class _PatchState(_Order):
    members: dict[str, JsonValue]
    notify: bool = False


class _PutData(_Order):
    payload: JsonValue
    content_type: str = "application/json"


class _PutSecret(_Order):
    value: str


class _Flags(_Order):
    reconcile: bool = False
    rotate_keys: bool = False


class _Emit(_Order):
    event_type: str
    payload: JsonValue = None
    payload_text: str | None = None
    signer: Signer = "current"
    event_id: str | None = None
    nonce: str | None = None
    issued_at: str | None = None
    size: int | None = None


class _Stream(_Order):
    raw: str | None = None
    raw_base64: Base64Bytes | None = None
    end: bool = False


class _StreamSettings(_Order):
    keepalive_seconds: Annotated[float, Field(gt=0)] | None = None
    retry_milliseconds: int | None = None


class _Policies(_Order):
    policies: list[JsonValue]


class _Rotate(_Order):
    transition_seconds: float = 86_400.0


class _Token(_Order):
    value: str | None = None
    lifetime_seconds: float | None = None


class _Follow(_Order):
    pattern: str
    expected: dict[str, int]


class _Wait(_Order):
    endpoint: str | None = None
    node: str | None = None
    count: PositiveInt = 1
    after: int = 0
    contains: JsonValue = None
    timeout_seconds: float = 10.0


class _AdminRoutes:
    def __init__(self, admin: Admin) -> None:
        self._admin = admin

    async def nodes(self, _request: Request) -> Any:
        return [self._admin.describe(node_id) for node_id in self._admin.fleet.nodes]

    async def node(self, request: Request) -> Any:
        return self._admin.describe(_node(request))

    async def remove(self, request: Request) -> None:
        self._admin.remove(_node(request))

    async def revoke(self, request: Request) -> None:
        self._admin.revoke(_node(request))

    async def restore(self, request: Request) -> None:
        self._admin.restore(_node(request))

    async def state(self, request: Request) -> Any:
        return self._admin.state(_node(request))

    async def patch_state(self, request: Request) -> None:
        order = await _body(request, _PatchState)
        self._admin.patch_state(_node(request), order.members, notify=order.notify)

    async def put_data(self, request: Request) -> None:
        order = await _body(request, _PutData)
        self._admin.put_data(_node(request), request.path_params["key"], order.payload, order.content_type)

    async def put_secret(self, request: Request) -> None:
        order = await _body(request, _PutSecret)
        self._admin.put_secret(_node(request), request.path_params["key"], order.value.encode())

    async def flags(self, request: Request) -> None:
        order = await _body(request, _Flags)
        self._admin.ask(_node(request), reconcile=order.reconcile, rotate_keys=order.rotate_keys)

    async def emit(self, request: Request) -> Any:
        order = await _body(request, _Emit)
        return {"event_id": self._admin.emit(_node(request), **dict(order))}

    async def stream(self, request: Request) -> None:
        order = await _body(request, _Stream)
        raw = (order.raw or "").encode() + (order.raw_base64 or b"")
        if raw:
            self._admin.emit_raw(_node(request), raw)
        if order.end:
            self._admin.end_stream(_node(request))

    async def stream_settings(self, request: Request) -> None:
        self._admin.set_stream(**dict(await _body(request, _StreamSettings)))

    async def policies(self, _request: Request) -> Any:
        return self._admin.fleet.snapshot.policies

    async def set_policies(self, request: Request) -> None:
        self._admin.fleet.set_policies((await _body(request, _Policies)).policies)

    async def rotate_signing_key(self, request: Request) -> None:
        self._admin.fleet.rotate_signing_key((await _body(request, _Rotate)).transition_seconds)

    async def token(self, request: Request) -> Any:
        order = await _body(request, _Token)
        return {"token": self._admin.issue_token(order.value, lifetime=order.lifetime_seconds)}

    async def artifact(self, request: Request) -> None:
        self._admin.put_artifact(request.path_params["version"], request.path_params["arch"], await request.body())

    async def telemetry(self, request: Request) -> Any:
        return self._admin.telemetry(_node(request), request.path_params["pipeline"])

    async def follow(self, request: Request) -> Any:
        order = await _body(request, _Follow)
        return self._admin.follow_logs(_node(request), order.pattern, order.expected)

    async def arrivals(self, request: Request) -> Any:
        query = request.query_params
        try:
            after = int(query.get("after", "0"))
        except ValueError:
            raise Refusal(400, "after must be the number of an arrival") from None
        return [a.as_json() for a in self._admin.arrived(query.get("endpoint"), query.get("node"), after=after)]

    async def wait(self, request: Request) -> Any:
        order = await _body(request, _Wait)

        def fits(arrival: Arrival) -> bool:
            return order.contains is None or _contains(arrival.body, order.contains)

        found = await self._admin.wait_for(
            order.endpoint, order.node, count=order.count, after=order.after, where=fits, timeout=order.timeout_seconds
        )
        return [arrival.as_json() for arrival in found]

    async def faults(self, _request: Request) -> Any:
        return [fault.model_dump(mode="json") for fault in self._admin.pending_faults]

    async def inject(self, request: Request) -> None:
        self._admin.inject(await _body(request, Fault))

    async def clear_faults(self, _request: Request) -> None:
        self._admin.clear_faults()

    async def stop_listening(self, _request: Request) -> None:
        await self._admin.stop_listening()

    async def start_listening(self, _request: Request) -> None:
        await self._admin.start_listening()


def admin_application(admin: Admin, *, changed: Callable[[], None]) -> Starlette:
    """`changed` is called after every order."""
    routes = _AdminRoutes(admin)

    def route(method: str, path: str, handle: Callable[[Request], Awaitable[Any]]) -> Route:
        async def answer(request: Request) -> Response:
            try:
                value = await handle(request)
            except Refusal as refusal:
                return JSONResponse({"error": refusal.reason} | refusal.details, refusal.status)
            except ValidationError as exc:
                faults = [f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in exc.errors()]
                return JSONResponse({"error": "; ".join(faults)}, 400)
            except KeyError as exc:
                return JSONResponse({"error": str(exc.args[0])}, 400)
            except TimeoutError as exc:
                return JSONResponse({"error": str(exc)}, 408)
            finally:
                changed()
            return Response(status_code=204) if value is None else JSONResponse(value)

        return Route(path, answer, methods=[method])

    return Starlette(
        routes=[
            route("GET", "/nodes", routes.nodes),
            route("GET", "/nodes/{node}", routes.node),
            route("DELETE", "/nodes/{node}", routes.remove),
            route("POST", "/nodes/{node}/revoke", routes.revoke),
            route("POST", "/nodes/{node}/restore", routes.restore),
            route("GET", "/nodes/{node}/state", routes.state),
            route("PATCH", "/nodes/{node}/state", routes.patch_state),
            route("PUT", "/nodes/{node}/data/{key:path}", routes.put_data),
            route("PUT", "/nodes/{node}/secrets/{key:path}", routes.put_secret),
            route("POST", "/nodes/{node}/flags", routes.flags),
            route("POST", "/nodes/{node}/events", routes.emit),
            route("POST", "/nodes/{node}/stream", routes.stream),
            route("PUT", "/stream", routes.stream_settings),
            route("GET", "/policies", routes.policies),
            route("PUT", "/policies", routes.set_policies),
            route("POST", "/signing-keys/rotate", routes.rotate_signing_key),
            route("POST", "/tokens", routes.token),
            route("PUT", "/artifacts/{version}/{arch}", routes.artifact),
            route("POST", "/nodes/{node}/telemetry/follow", routes.follow),
            route("GET", "/nodes/{node}/telemetry/{pipeline}", routes.telemetry),
            route("GET", "/arrivals", routes.arrivals),
            route("POST", "/arrivals/wait", routes.wait),
            route("GET", "/faults", routes.faults),
            route("POST", "/faults", routes.inject),
            route("DELETE", "/faults", routes.clear_faults),
            route("POST", "/listener/stop", routes.stop_listening),
            route("POST", "/listener/start", routes.start_listening),
        ]
    )


def _node(request: Request) -> str:
    return str(request.path_params["node"])


async def _body(request: Request, model: type[BodyT]) -> BodyT:
    return model.model_validate_json(await request.body() or b"{}")


def _contains(value: Any, wanted: Any) -> bool:
    """Whether all of `wanted` is in `value`: members of objects, elements of lists, anything else equal."""
    if isinstance(wanted, dict):
        return isinstance(value, dict) and all(k in value and _contains(value[k], v) for k, v in wanted.items())
    if isinstance(wanted, list):
        return isinstance(value, list) and all(any(_contains(e, w) for e in value) for w in wanted)
    return bool(value == wanted)
