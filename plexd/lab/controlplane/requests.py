"""What a request must look like, judged without mercy, so that an agent's mistake is found here and not in production.

The wire models say which types are right; reading with them is lenient, as the contract wants it between strangers.
What they forgive is refused here: members that must always be written and are not, `null`, unknown members, empty
optional members, time stamps in another form, white space, missing compression. Pure: bytes in, values or a Refusal
with the reason out. No reason repeats a value.
"""

from __future__ import annotations

import re
import types
import typing
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from plexd.errors import WireError
from plexd.lab.controlplane.refusal import Refusal
from plexd.mesh.address import parse_endpoint
from plexd.mesh.keys import PublicKey
from plexd.wire import endpoints, models
from plexd.wire.endpoints import AnswerBody, Endpoint
from plexd.wire.models import Model, OmitEmpty
from plexd.wire.reading import JSONText, load, read_value
from plexd.wire.times import to_utc
from plexd.wire.values import parse_checksum, path_segment

BODY_LIMIT = 10 * 1024 * 1024  # after decompression; beyond it the answer is 413, as a careful server's would be
GZIP_ABOVE = 1024

_ACCEPT = {AnswerBody.EVENT_STREAM: "text/event-stream", AnswerBody.OCTETS: "application/octet-stream"}
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_WHITE_SPACE = re.compile(r"[ \t\r\n]")
_HOSTNAME = re.compile(r"[^\s\x00-\x1f\x7f-\x9f]{1,253}")
_TOKEN = re.compile(r"[\x20-\x7e]{1,512}")


class Route(NamedTuple):
    endpoint: Endpoint
    parameters: Mapping[str, str]


class Body(NamedTuple):
    """`value` is a model, or a tuple of them for a batch; `text` what it was read from."""

    value: Any
    text: bytes


# --- path ------------------------------------------------------------------------------------------------------------


def find_route(method: str, raw_path: str) -> Route:
    """The endpoint and its decoded path parameters. Refusal 404 for no such path, 405 for another method, 400 for a
    parameter that should not have been sent."""
    segments = raw_path.split("/")
    allowed = []
    for endpoint in (*endpoints.ENDPOINTS, *endpoints.EXTENSIONS):
        names = endpoint.template.split("/")
        if len(names) == len(segments) and all(
            name.startswith("{") or name == segment for name, segment in zip(names, segments, strict=True)
        ):
            if endpoint.method == method:
                pairs = zip(names, segments, strict=True)
                return Route(endpoint, {n[1:-1]: _parameter(n, s) for n, s in pairs if n.startswith("{")})
            allowed.append(endpoint.method)
    if allowed:
        raise Refusal(405, f"the method must be {' or '.join(allowed)}")
    raise Refusal(404, "there is no such endpoint")


def _parameter(name: str, segment: str) -> str:
    try:
        text = unquote_to_bytes(segment).decode()
        if path_segment(text) != segment:
            raise Refusal(400, f"path parameter {name} is not percent-encoded as it should be")
    except ValueError:
        raise Refusal(400, f"path parameter {name} must not be sent") from None
    return text


# --- headers ---------------------------------------------------------------------------------------------------------


def bearer(headers: Mapping[str, str]) -> str:
    """The credential. Refusal 401 when there is none."""
    scheme, _, credential = headers.get("authorization", "").partition(" ")
    if scheme != "Bearer" or not credential:
        raise Refusal(401, "header Authorization must be a bearer credential")
    return credential


def check_headers(endpoint: Endpoint, headers: Mapping[str, str]) -> None:
    """Refusal 400 for a header that is not as docs/contract/wire.md §1.1 wants it. Names are lower-case."""
    expected = {
        "accept": _ACCEPT.get(endpoint.answer, "application/json"),
        "accept-encoding": "identity" if endpoint.answer in _ACCEPT else "gzip",
    }
    if endpoint.answer is AnswerBody.EVENT_STREAM:
        expected["cache-control"] = "no-cache"
    if endpoint.request is not None:
        expected["content-type"] = "application/json"
    elif "content-type" in headers:
        raise Refusal(400, "header Content-Type must not be sent without a body")
    for name, value in expected.items():
        if headers.get(name) != value:
            raise Refusal(400, f"header {name.title()} must be {value!r} and is {headers.get(name)!r}")
    if not re.fullmatch(r"plexd/\S+", headers.get("user-agent", "")):
        raise Refusal(400, "header User-Agent must be plexd/<version>")


# --- body ------------------------------------------------------------------------------------------------------------


def read_body(endpoint: Endpoint, headers: Mapping[str, str], raw: bytes, *, may_be_plain: bool = False) -> Body | None:
    """The body as the endpoint's model; None where none belongs.

    `may_be_plain`: the sender was just told that gzip is not welcome. Refusal 400 with the reason, 413 when too large.
    """
    if endpoint.request is None:
        if raw:
            raise Refusal(400, "this request has no body")
        return None
    text = decode(headers, raw)
    compressed = "content-encoding" in headers
    wanted = endpoint.always_gzip or len(text) > GZIP_ABOVE
    if compressed != wanted and not (may_be_plain and not compressed):
        raise Refusal(400, f"a body of {len(text)} bytes must {'' if wanted else 'not '}be compressed here")
    try:
        value = load(text)
        if _WHITE_SPACE.search(_STRING.sub("", text.decode())):
            raise Refusal(400, "body has insignificant white space")
        return Body(_strictly(endpoint, value), text)
    except WireError as exc:
        raise Refusal(400, str(exc)) from None


def decode(headers: Mapping[str, str], raw: bytes) -> bytes:
    """The body without its Content-Encoding. Refusal 413 when it has more than BODY_LIMIT bytes."""
    encoding = headers.get("content-encoding")
    if encoding is None:
        if len(raw) > BODY_LIMIT:
            raise Refusal(413, f"a body may have {BODY_LIMIT} bytes")
        return raw
    if encoding != "gzip":
        raise Refusal(415, "header Content-Encoding must be gzip")
    decompressor = zlib.decompressobj(wbits=31)
    try:
        text = decompressor.decompress(raw, BODY_LIMIT + 1)
    except zlib.error:
        raise Refusal(400, "body is not gzip") from None
    if len(text) > BODY_LIMIT:
        raise Refusal(413, f"a body may have {BODY_LIMIT} bytes after decompression")
    if not decompressor.eof or decompressor.unused_data:
        raise Refusal(400, "body is not one whole gzip stream")
    return text


def _strictly(endpoint: Endpoint, value: Any) -> Any:
    model = endpoint.request
    assert model is not None  # noqa: S101 - asked by read_body
    if not endpoint.batch:
        return _element(model, value, "")
    if not isinstance(value, list) or not value:
        raise Refusal(400, "body must be an array of at least one element")
    return tuple(_element(model, element, f"[{index}]") for index, element in enumerate(value))


def _element(model: type[Model], value: Any, place: str) -> Model:
    _check_presence(model, value, place)
    try:
        read, skipped = read_value(model, value)
    except WireError as exc:
        raise Refusal(400, f"{place} {exc}".strip()) from None
    for fault in skipped:
        raise Refusal(400, f"{place}.{fault.path} {fault.reason}".removeprefix("."))
    _check_values(read, value, place)
    return read


class _Member(NamedTuple):
    name: str
    omit_empty: bool
    arbitrary: bool  # any JSON, null included
    is_time: bool
    model: type[Model] | None  # of the member, or of its elements


@cache
def _members(model: type[Model]) -> Mapping[str, _Member]:
    return {name: _member(name, field) for name, field in model.model_fields.items()}


def _member(name: str, field: FieldInfo) -> _Member:
    found = _types_in(field.annotation)
    return _Member(
        name,
        omit_empty=any(isinstance(mark, OmitEmpty) for mark in field.metadata),
        arbitrary=JSONText in found,
        is_time=any(isinstance(mark, AfterValidator) and mark.func is to_utc for mark in field.metadata),
        model=next((kind for kind in found if isinstance(kind, type) and issubclass(kind, Model)), None),
    )


def _types_in(annotation: Any) -> list[Any]:
    """The types named in an annotation: of an optional or of the elements of a list, maps left alone."""
    origin = typing.get_origin(annotation)
    if origin in {tuple, types.UnionType, typing.Union, typing.Annotated}:
        return [kind for part in typing.get_args(annotation) for kind in _types_in(part)]
    return [annotation] if origin is None else []


def _check_presence(model: type[Model], value: Any, place: str) -> None:
    if not isinstance(value, dict):
        raise Refusal(400, f"{place or 'body'} must be an object")
    members = _members(model)
    for name, inner in value.items():
        member = members.get(name)
        where = f"{place}.{name}".removeprefix(".")
        if member is None:
            raise Refusal(400, f"{where} is not a member of {model.__name__}")
        if member.arbitrary:
            continue
        if inner is None:
            raise Refusal(400, f"{where} is null; " + ("leave it out" if member.omit_empty else "it must have a value"))
        if member.omit_empty and inner in ("", {}, []):
            raise Refusal(400, f"{where} is empty and must be left out")
        if member.model is not None:
            if isinstance(inner, list):
                for index, element in enumerate(inner):
                    _check_presence(member.model, element, f"{where}[{index}]")
            else:
                _check_presence(member.model, inner, where)
    for name, member in members.items():
        if name not in value and not member.omit_empty:
            raise Refusal(400, f"{place}.{name}".removeprefix(".") + " is missing")


def _check_values(read: Model, value: Mapping[str, Any], place: str) -> None:
    for name, member in _members(type(read)).items():
        where = f"{place}.{name}".removeprefix(".")
        inner = getattr(read, name)
        if member.is_time and inner != value[name]:
            raise Refusal(400, f"{where} must be a time in UTC with Z and without trailing zeros")
        if isinstance(inner, Model):
            _check_values(inner, value[name], where)
        elif member.model is not None and isinstance(inner, Sequence):
            for index, (element, raw) in enumerate(zip(inner, value[name], strict=True)):
                _check_values(element, raw, f"{where}[{index}]")
    check = _FORMS.get(type(read))
    if check is not None:
        try:
            check(read)
        except ValueError as exc:
            raise Refusal(400, f"{place} {exc}".strip()) from None


# --- forms the models leave open: docs/contract/wire.md §6.5, §6.6 and §8 ----------------------------------------


def _register(request: models.RegisterRequest) -> None:
    _key("public_key", request.public_key)
    if not _HOSTNAME.fullmatch(request.hostname):
        raise ValueError("hostname must have 1 to 253 characters without white space")
    if not _TOKEN.fullmatch(request.token.get_secret_value()):
        raise ValueError("token must have 1 to 512 printable ASCII characters")


def _heartbeat(request: models.HeartbeatRequest) -> None:
    _checksum("binary_checksum", request.binary_checksum)
    if not re.fullmatch(r"(\d+h)?(\d+m)?\d+s", request.uptime):
        raise ValueError("uptime must be a duration in whole seconds")


def _mesh_info(mesh: models.MeshInfo) -> None:
    if not mesh.interface or mesh.peer_count < 0 or not 1 <= mesh.listen_port <= 65535:
        raise ValueError("must name an interface, a count and a port")


def _nat_info(nat: models.NATInfo) -> None:
    _endpoint("public_endpoint", nat.public_endpoint)


def _endpoint_report(report: models.EndpointReport) -> None:
    _endpoint("public_endpoint", report.public_endpoint)


def _key_rotation(request: models.KeyRotateRequest) -> None:
    _key("new_public_key", request.new_public_key)


def _binary(info: models.BinaryInfo) -> None:
    _checksum("checksum", info.checksum)


def _capabilities(payload: models.CapabilitiesPayload) -> None:
    for name, entries in (("builtin_actions", payload.builtin_actions), ("hooks", payload.hooks)):
        names = [entry.name for entry in entries]
        if names != sorted(set(names)):
            raise ValueError(f"{name} must be sorted by name, each name once")


def _ack(ack: models.ExecutionAck) -> None:
    if (ack.status == "accepted") != (ack.reason == ""):
        raise ValueError("reason must be empty when accepted and given when rejected")


def _correction(correction: models.DriftCorrection) -> None:
    if not correction.type or not correction.detail:
        raise ValueError("type and detail must not be empty")


def _key(name: str, text: str) -> None:
    try:
        PublicKey.parse(text)
    except ValueError as exc:
        raise ValueError(f"{name} is no WireGuard key: {exc}") from None


def _endpoint(name: str, text: str) -> None:
    if text:
        try:
            parse_endpoint(text)
        except ValueError as exc:
            raise ValueError(f"{name} is no endpoint: {exc}") from None


def _checksum(name: str, text: str) -> None:
    if text and parse_checksum(text) != text:
        raise ValueError(f"{name} must be written sha256: and 64 lower-case hex digits")


_FORMS: Mapping[type[Model], Callable[[Any], None]] = {
    models.RegisterRequest: _register,
    models.HeartbeatRequest: _heartbeat,
    models.MeshInfo: _mesh_info,
    models.NATInfo: _nat_info,
    models.EndpointReport: _endpoint_report,
    models.KeyRotateRequest: _key_rotation,
    models.BinaryInfo: _binary,
    models.CapabilitiesPayload: _capabilities,
    models.ExecutionAck: _ack,
    models.DriftCorrection: _correction,
}
