"""The node API as an OpenAPI document, made from the table of routes: what is in the table is in the document.

Imported when somebody first asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from plexd import __version__
from plexd.api.routes import Right, Route

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
VERSION: Schema = {"type": "integer"}
KEY: Schema = {"type": "string", "minLength": 1}
REPORT_KEY: Schema = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"}
WRITTEN_KEY: Schema = {**REPORT_KEY, "not": {"pattern": "^plexd\\."}}
SYNC: Schema = {"type": "string", "enum": ["synced", "pending", "rejected"]}
# no longer than a listener reads; an exact pattern would be unreadable
CONTENT_TYPE: Schema = {
    "type": "string", "maxLength": 127, "pattern": "^[A-Za-z0-9.+-]{1,60}/[A-Za-z0-9.+-]{1,60}$",
    "description": "type/subtype, with parameters if need be", "example": "application/json",
}  # fmt: skip


def _object(**members: Schema) -> Schema:
    return {"type": "object", "required": list(members), "properties": members}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


NAMED = _object(key=TEXT, version=VERSION)
DATA_NAME = _object(key=TEXT, version=VERSION, content_type=TEXT)
ENTRY = _object(key=TEXT, content_type=TEXT, payload={}, version=VERSION, updated_at=TEXT)
SUMMARY = _object(
    revision={"type": "integer", "minimum": 1},
    metadata={"type": "object", "additionalProperties": TEXT},
    data_keys=_list(DATA_NAME),
    secret_keys=_list(NAMED),
    report_keys=_list(NAMED),
)
SECRET = _object(key=TEXT, value=TEXT, version=VERSION)
SECRET["properties"] |= {"encoding": {"type": "string", "enum": ["base64"]}}
ERROR = _object(error=TEXT, code={"type": "string", "pattern": "^[a-z_]+$"})

WAIT = (
    {"name": "since", "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": 10**17},
     "description": "answer as soon as the revision is beyond this one"},
    {"name": "wait", "in": "query", "schema": {"type": "string", "pattern": "^([1-9]|[1-5][0-9])s$"},
     "description": "how long to wait for that, at most 60s; 304 when the time is over"},
)  # fmt: skip
IF_NONE_MATCH = (
    {"name": "If-None-Match", "in": "header", "schema": {"type": "string", "pattern": '^"[0-9]{1,9}"$'},
     "description": "304 when the entry has this version"},
)  # fmt: skip
PRECONDITIONS = (
    {"name": "If-Match", "in": "header", "schema": {"type": "string", "pattern": r"^([0-9]{1,18}|\*)$"},
     "description": "only if this is the version now; 0: if there is none; *: if there is one"},
    {"name": "If-None-Match", "in": "header", "schema": {"type": "string", "enum": ["*"]},
     "description": "only if there is none"},
)  # fmt: skip
REPORT = {
    "type": "object",
    "required": ["content_type", "payload"],
    "properties": {"content_type": CONTENT_TYPE, "payload": {"description": "any JSON value"}},
}


class Operation(NamedTuple):
    """What the table of routes does not say: the sentence, the schema of a good answer, parameters, other statuses."""

    summary: str
    answer: Schema | None = None
    status: int = 200
    others: tuple[int, ...] = ()
    parameters: tuple[Schema, ...] = ()
    key: Schema = KEY
    body: Schema | None = None


OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("GET", "/v1/state"): Operation("Everything there is, by name", SUMMARY, others=(304, 400, 503), parameters=WAIT),
    ("GET", "/v1/state/metadata"): Operation(
        "What the control plane says about this node", {"type": "object", "additionalProperties": TEXT}
    ),
    ("GET", "/v1/state/metadata/{key}"): Operation("One of these", _object(key=TEXT, value=TEXT), others=(404,)),
    ("GET", "/v1/state/data"): Operation("Which data the control plane has for programs here", _list(DATA_NAME)),
    ("GET", "/v1/state/data/{key}"): Operation("One of these", ENTRY, others=(304, 404), parameters=IF_NONE_MATCH),
    ("GET", "/v1/state/secrets"): Operation("Which secrets there are", _list(NAMED)),
    ("GET", "/v1/state/secrets/{key}"): Operation(
        "A secret, fetched from the control plane now", SECRET, others=(400, 404, 500, 502, 503)
    ),
    ("GET", "/v1/state/report"): Operation(
        "Which reports there are",
        _list(_object(key=TEXT, version=VERSION, content_type=TEXT, updated_at=TEXT, sync=SYNC)),
    ),
    ("GET", "/v1/state/report/{key}"): Operation(
        "One of these", _object(**ENTRY["properties"], sync=SYNC), others=(304, 400, 404),
        parameters=IF_NONE_MATCH, key=REPORT_KEY,
    ),
    ("PUT", "/v1/state/report/{key}"): Operation(
        "Write a report; the daemon delivers it", ENTRY, others=(400, 409, 413, 500, 503, 507),
        parameters=PRECONDITIONS, key=WRITTEN_KEY, body=REPORT,
    ),
    ("DELETE", "/v1/state/report/{key}"): Operation(
        "Delete a report", status=204, others=(400, 404, 409, 500, 503), parameters=PRECONDITIONS, key=WRITTEN_KEY
    ),
    ("GET", "/v1/status"): Operation("How this node is", {"type": "object"}),
    ("GET", "/v1/peers"): Operation("Who it is connected with, and why not", _list({"type": "object"})),
    ("GET", "/v1/peers/{key}"): Operation("One of them, by id or mesh address", {"type": "object"}, others=(404,)),
    ("GET", "/v1/policies"): Operation("Who may talk to whom, and what each rule has met", {"type": "object"}),
    ("GET", "/v1/metrics/status"): Operation("How metrics are delivered", {"type": "object"}, others=(503,)),
    ("GET", "/v1/log-status"): Operation("How logs are delivered", {"type": "object"}, others=(503,)),
    ("GET", "/v1/audit/status"): Operation("How audit entries are delivered", {"type": "object"}, others=(503,)),
    ("GET", "/v1/health"): Operation("Which conditions hold", {"type": "object"}),
    ("POST", "/v1/reconcile"): Operation(
        "Compare with the control plane now", _object(status=TEXT), status=202, others=(503,)
    ),
    ("POST", "/v1/config/reload"): Operation(
        "Read the configuration again",
        _object(status=TEXT, changed=_list(TEXT), restart_required=_list(TEXT)),
        others=(422,),
    ),
    ("GET", "/healthz"): Operation("Whether the daemon lives", _object(status=TEXT)),
    ("GET", "/readyz"): Operation("Whether the node is ready", _object(status=TEXT)),
}  # fmt: skip

RIGHTS = {
    Right.NONE: "Anybody may ask.",
    Right.READ: "For root and the group plexd.",
    Right.REPORT: "For root and the group plexd.",
    Right.SECRET: "For root and the group plexd-secrets.",
    Right.ADMIN: "For root.",
}
NOT_READY = _object(status=TEXT, reason=TEXT)


def describe(routes: Iterable[Route]) -> dict[str, Any]:
    """The document; a route that is not described further answers some JSON."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if route.method != "HEAD":
            paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "plexd node API", "version": __version__},
        "paths": paths,
        "components": {"schemas": {"Error": ERROR}},
    }


def _operation(route: Route) -> dict[str, Any]:
    known = OPERATIONS.get((route.method, route.path), Operation("Answers JSON", {}, others=(503,)))
    parameters = list(known.parameters)
    if "{key}" in route.path:
        parameters.insert(0, {"name": "key", "in": "path", "required": True, "schema": known.key})
    others = {str(status): _error(status) for status in sorted({*known.others, 403})}
    if route.right is Right.NONE:
        del others["403"]
    if route.path == "/readyz":
        others["503"] = _response("not ready, and why", NOT_READY)
    operation: dict[str, Any] = {
        "summary": known.summary,
        "description": RIGHTS[route.right],
        "parameters": parameters,
        "responses": {str(known.status): _response("done", known.answer), **others},
    }
    if known.body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": known.body}}}
    return operation


def _response(description: str, schema: Schema | None) -> dict[str, Any]:
    content = {} if schema is None else {"content": {"application/json; charset=utf-8": {"schema": schema}}}
    return {"description": description, **content}


def _error(status: int) -> dict[str, Any]:
    if status == 304:
        return _response("nothing new", None)
    return _response("refused, and why", {"$ref": "#/components/schemas/Error"})
