"""Metadata, data, secret names and reports: what programs on this node read and write (docs/contract/node-api.md §3 and
§4).

Metadata, data and secret names are part of the desired snapshot, which is their only home; reports are this node's own.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

from plexd.api.http_server import Response
from plexd.api.preconditions import BadPrecondition, demanded, is_known
from plexd.api.revision import Revision
from plexd.api.routes import Call, Right, Route, answer, refuse
from plexd.errors import WireError
from plexd.log import get_logger
from plexd.mesh.desired import DataEntry, Desired
from plexd.node.reports import NoSuchReport, Reports, TooManyReports, VersionConflict
from plexd.wire.durations import parse_duration
from plexd.wire.reading import JSONText, load

log = get_logger("api")

MAX_WAIT_SECONDS = 60.0
MAX_WAITING = 64  # half of the connections there can be
OFF_LOOP_BYTES = 64 << 10  # a larger body is taken apart in a thread, so that the event loop does not stall
RESERVED = "plexd."
_REPORT_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - of RFC 9110
_CONTENT_TYPE = re.compile(
    rf'{_TOKEN}/{_TOKEN}(?:[ \t]*;[ \t]*{_TOKEN}=(?:{_TOKEN}|"[^"\\\x00-\x1f\x7f]*"))*', re.ASCII
)
MAX_CONTENT_TYPE = 127


class StateRoutes:
    """`desired` gives the snapshot of the moment."""

    def __init__(self, desired: Callable[[], Desired], reports: Reports, revision: Revision) -> None:
        self._desired = desired
        self._reports = reports
        self._revision = revision

    def table(self) -> tuple[Route, ...]:
        return (
            Route("GET", "/v1/state", Right.READ, self._summary),
            Route("GET", "/v1/state/metadata", Right.READ, self._all_metadata),
            Route("GET", "/v1/state/metadata/{key}", Right.READ, self._one_metadata),
            Route("GET", "/v1/state/data", Right.READ, self._all_data),
            Route("GET", "/v1/state/data/{key}", Right.READ, self._one_data),
            Route("GET", "/v1/state/secrets", Right.SECRET, self._all_secrets),
            Route("GET", "/v1/state/report", Right.READ, self._all_reports),
            Route("GET", "/v1/state/report/{key}", Right.READ, self._one_report),
            Route("PUT", "/v1/state/report/{key}", Right.REPORT, self._put_report),
            Route("DELETE", "/v1/state/report/{key}", Right.REPORT, self._delete_report),
        )

    # reading

    async def _summary(self, call: Call) -> Response:
        try:
            since, seconds = _waiting(call.request.query)
        except ValueError as exc:
            return refuse(400, "invalid_parameter", str(exc))
        if since is not None:
            if seconds and self._revision.waiting >= MAX_WAITING:
                return refuse(503, "too_many_waiting", "too many callers wait for a change", ("Retry-After", "1"))
            if not await self._revision.beyond(since, seconds):
                return Response(304)
        desired = self._desired()
        entries = self._reports.entries
        return answer(
            {
                "revision": self._revision.number,
                "metadata": dict(desired.metadata),
                "data_keys": _data_list(desired),
                "secret_keys": _secret_list(desired) if await call.may(Right.SECRET) else [],
                "report_keys": [{"key": key, "version": entries[key].version} for key in sorted(entries)],
            }
        )

    async def _all_metadata(self, _: Call) -> Response:
        return answer(dict(self._desired().metadata))

    async def _one_metadata(self, call: Call) -> Response:
        value = self._desired().metadata.get(call.key)
        return _unknown("metadata") if value is None else answer({"key": call.key, "value": value})

    async def _all_data(self, _: Call) -> Response:
        return answer(_data_list(self._desired()))

    async def _one_data(self, call: Call) -> Response:
        entry = self._desired().data.get(call.key)
        return _unknown("data") if entry is None else _entry(call, entry)

    async def _all_secrets(self, _: Call) -> Response:
        return answer(_secret_list(self._desired()))

    async def _all_reports(self, _: Call) -> Response:
        return answer(
            [
                {
                    "key": key,
                    "version": entry.version,
                    "content_type": entry.content_type,
                    "updated_at": entry.updated_at,
                    "sync": self._reports.sync_of(key),
                }
                for key, entry in sorted(self._reports.entries.items())
            ]
        )

    async def _one_report(self, call: Call) -> Response:
        if not _REPORT_KEY.fullmatch(call.key):
            return _invalid_key()
        entry = self._reports.entries.get(call.key)
        return _unknown("report") if entry is None else _entry(call, entry, self._reports.sync_of(call.key))

    # writing

    async def _put_report(self, call: Call) -> Response:
        if refusal := self._refuse_write(call.key):
            return refusal
        try:
            may = demanded(call.request)
            body = call.request.body
            read = asyncio.to_thread(_read_report, body) if len(body) > OFF_LOOP_BYTES else None
            content_type, payload = await read if read is not None else _read_report(body)
            entry = await self._reports.put(call.key, content_type, payload, may)
        except _BadReport as exc:
            return refuse(400, exc.code, str(exc))
        except TooManyReports:
            return refuse(507, "report_limit", "this node holds as many reports as it may; delete one first")
        except (BadPrecondition, VersionConflict, OSError) as exc:
            return _refuse_failed(exc)
        return _entry(call, entry, is_written=True)

    async def _delete_report(self, call: Call) -> Response:
        if refusal := self._refuse_write(call.key):
            return refusal
        try:
            await self._reports.delete(call.key, demanded(call.request))
        except NoSuchReport:
            return _unknown("report")
        except (BadPrecondition, VersionConflict, OSError) as exc:
            return _refuse_failed(exc)
        return Response(204)

    def _refuse_write(self, key: str) -> Response | None:
        if self._revision.is_stopped:
            return refuse(503, "shutting_down", "plexd stops; try again when it is back")
        if not _REPORT_KEY.fullmatch(key):
            return _invalid_key()
        if key.startswith(RESERVED):
            return refuse(403, "reserved_key", f"keys that start with {RESERVED} are plexd's own")
        return None


class _BadReport(Exception):
    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def _read_report(body: bytes) -> tuple[str, str]:
    """Content type and payload, the latter as JSON text in which every number is as it was."""
    try:
        document: Any = load(body)
        if not isinstance(document, dict):
            raise _BadReport("invalid_json", "the body is not a JSON object")
        payload = JSONText.of(document["payload"]) if "payload" in document else None
    except WireError as exc:
        raise _BadReport("invalid_json", str(exc)) from None
    except RecursionError:
        raise _BadReport("invalid_json", "the payload is nested too deeply") from None
    content_type = document.get("content_type")
    if (
        not isinstance(content_type, str)
        or len(content_type) > MAX_CONTENT_TYPE
        or not _CONTENT_TYPE.fullmatch(content_type)
    ):
        sentence = f"content_type must be type/subtype, with at most {MAX_CONTENT_TYPE} characters"
        raise _BadReport("content_type_required", sentence)
    if payload is None:
        raise _BadReport("payload_required", "the member payload is missing; it may be null")
    return content_type, payload


def _refuse_failed(exc: BadPrecondition | VersionConflict | OSError) -> Response:
    match exc:
        case BadPrecondition():
            return refuse(400, "invalid_precondition", str(exc))
        case VersionConflict(current_version=current):
            return refuse(409, "version_conflict", f"the precondition does not hold: {exc}", current_version=current)
        case _:
            log.error("report not stored", error=str(exc), next_step="check the disk of data_dir")
            return refuse(500, "storage_error", "the report could not be stored; the log says why")


def _entry(call: Call, entry: DataEntry, sync: str | None = None, *, is_written: bool = False) -> Response:
    """The whole entry. Its payload is JSON text already and goes in as it is."""
    tag = ("ETag", f'"{entry.version}"')
    if not is_written and is_known(call.request, entry.version):
        return Response(304, headers=(tag,))
    head = json.dumps({"key": entry.key, "content_type": entry.content_type})
    tail: dict[str, object] = {"version": entry.version, "updated_at": entry.updated_at}
    if sync is not None:
        tail["sync"] = sync
    text = f'{head[:-1]}, "payload": {entry.payload}, {json.dumps(tail)[1:]}'
    return Response(200, text.encode(), (tag,))


def _data_list(desired: Desired) -> list[Any]:
    return [
        {"key": key, "version": entry.version, "content_type": entry.content_type}
        for key, entry in sorted(desired.data.items())
    ]


def _secret_list(desired: Desired) -> list[Any]:
    return [{"key": key, "version": version} for key, version in sorted(desired.secret_refs.items())]


def _unknown(kind: str) -> Response:
    return refuse(404, "not_found", f"there is no {kind} entry of this key")


def _invalid_key() -> Response:
    return refuse(400, "invalid_key", "the key of a report has 1 to 128 letters, digits, dots, dashes or underscores")


def _waiting(query: str) -> tuple[int | None, float]:
    """`since` and the seconds to `wait`. Raises ValueError with a sentence."""
    parameters = parse_qs(query, keep_blank_values=True, max_num_fields=16, errors="replace")
    since_text, wait_text = (parameters.get(name, [""])[-1] for name in ("since", "wait"))
    if since_text and not re.fullmatch("[0-9]{1,18}", since_text):
        raise ValueError("since must be a revision")
    try:
        seconds = parse_duration(wait_text) if wait_text else 0.0
    except ValueError:
        raise ValueError("wait must be a duration such as 30s") from None
    if not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise ValueError("wait must be at most 60s")
    return int(since_text) if since_text else None, seconds
