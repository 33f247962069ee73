"""Lines of the Kubernetes audit log as entries (docs/contract/telemetry.md §5.7)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, NoReturn

from plexd.audit.entry import FAILURE, SUCCESS, UNKNOWN, Entry, Value
from plexd.wire.times import format_time, to_utc

SOURCE = "k8s-audit"
BODIES = ("requestObject", "responseObject")  # may hold what is in a Secret


class Malformed(ValueError):
    """This is no event of a Kubernetes audit log."""


class Selection(NamedTuple):
    """Which events become entries, and whether with the bodies of request and answer."""

    stages: Sequence[str] = ("ResponseComplete", "Panic")  # the others carry no outcome
    exclude_verbs: Sequence[str] = ()
    exclude_users: Sequence[str] = ()
    strip_bodies: bool = True


def normalise(line: str, selection: Selection, hostname: str, now: float) -> Entry | None:
    """None for an event that is not wanted; `now` is when the line was read, in Unix seconds. Raises Malformed."""
    event = _parse(line)
    stage, verb = _text(event, "stage"), _text(event, "verb")
    user = _mapping(event, "user")
    username = _text(user, "username")
    if stage not in selection.stages:
        return None
    if _matches(verb, selection.exclude_verbs) or _matches(username, selection.exclude_users):
        return None
    if selection.strip_bodies:
        for key in BODIES:
            event.pop(key, None)
    return Entry(
        timestamp=_timestamp(event) or format_time(now),
        source=SOURCE,
        event_type=verb,
        subject=_subject(event, user),
        object=_object(event),
        action=verb,
        result=FAILURE if stage == "Panic" else _outcome(event),
        hostname=hostname,
        raw=json.dumps(event, ensure_ascii=False, separators=(",", ":")),
    )


def _parse(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line, parse_constant=_refuse)
    except RecursionError:
        raise Malformed("nested too deeply") from None
    except ValueError as exc:
        raise Malformed(str(exc)) from None
    if not isinstance(event, dict):
        raise Malformed("is no JSON object")
    return event


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _matches(text: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(text, glob) for glob in globs)


def _timestamp(event: Mapping[str, Any]) -> str:
    for key in ("stageTimestamp", "requestReceivedTimestamp"):
        try:
            stamp = to_utc(_text(event, key))
        except ValueError:
            continue
        if stamp:
            return stamp
    return ""


def _subject(event: Mapping[str, Any], user: Mapping[str, Any]) -> dict[str, Value]:
    stated: dict[str, Value] = {
        "username": _text(user, "username"),
        "groups": _texts(user, "groups"),
        "uid": _text(user, "uid"),
        "source_ips": _texts(event, "sourceIPs"),
        "user_agent": _text(event, "userAgent"),
        "impersonated": _text(_mapping(event, "impersonatedUser"), "username"),
    }
    return {key: value for key, value in stated.items() if value}


def _object(event: Mapping[str, Any]) -> dict[str, Value]:
    uri = _text(event, "requestURI")
    reference = _mapping(event, "objectRef")
    resource, namespace, name = (_text(reference, key) for key in ("resource", "namespace", "name"))
    if not resource:
        return {"uri": uri, "ref": uri} if uri else {}
    stated: dict[str, Value] = {
        "resource": resource,
        "subresource": _text(reference, "subresource"),
        "namespace": namespace,
        "name": name,
        "api_group": _text(reference, "apiGroup"),
        "api_version": _text(reference, "apiVersion"),
        "uri": uri,
        "ref": "/".join(part for part in (namespace, resource, name) if part),
    }
    return {key: value for key, value in stated.items() if value}


def _outcome(event: Mapping[str, Any]) -> str:
    code = _mapping(event, "responseStatus").get("code")
    if not isinstance(code, int) or isinstance(code, bool) or code < 100:
        return UNKNOWN
    return SUCCESS if code < 400 else FAILURE


def _text(found: Mapping[str, Any], key: str) -> str:
    value = found.get(key)
    return value.replace("\0", "") if isinstance(value, str) else ""


def _texts(found: Mapping[str, Any], key: str) -> list[str]:
    value = found.get(key)
    return [item.replace("\0", "") for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _mapping(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = found.get(key)
    return value if isinstance(value, dict) else {}
