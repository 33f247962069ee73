"""`plexd state`: what programs on this node may read, and what they report, from a shell."""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from pathlib import Path
from urllib.parse import quote

from plexd.cli.asking import Failed, ask, show
from plexd.config.api_socket import find_socket
from plexd.errors import FatalError
from plexd.masking import quoted

ROUTES = {"metadata": "metadata", "data": "data", "report": "report", "secret": "secrets"}
JSON = "application/json"


class BadUsage(FatalError):
    """The arguments do not fit together."""

    exit_code = 2


def summary(args: argparse.Namespace) -> int:
    _show(args, ask(find_socket(vars(args), os.environ), "/v1/state", as_json="json" in args))
    return 0


def get(args: argparse.Namespace) -> int:
    if args.raw and args.kind != "secret":
        raise BadUsage("--raw is for secrets")
    body = ask(find_socket(vars(args), os.environ), _route(args.kind, args.key), as_json="json" in args)
    if args.raw:
        document = json.loads(body)
        value = document["value"].encode()
        sys.stdout.buffer.write(base64.b64decode(value) if document.get("encoding") == "base64" else value)
        if sys.stdout.isatty():
            print()
    else:
        _show(args, body)
    return 0


def report(args: argparse.Namespace) -> int:
    path, route = find_socket(vars(args), os.environ), _route("report", args.key)
    headers = {} if args.if_match is None else {"If-Match": args.if_match}
    as_json = "json" in args
    if args.delete:
        if args.content_type is not None:
            raise BadUsage("--content-type is for --data")
        ask(path, route, as_json=as_json, method="DELETE", headers=headers)
        if not as_json:
            print(f"report {args.key} deleted")
        return 0
    # the payload goes in as it is written, so that numbers keep their digits
    body = f'{{"content_type":{json.dumps(args.content_type or JSON)},"payload":{_payload(args.data)}}}'
    answer = ask(path, route, as_json=as_json, method="PUT", body=body, headers=headers)
    if as_json:
        show(answer)
    else:
        print(f"report {args.key} written (version {json.loads(answer, parse_int=str)['version']})")
    return 0


def _payload(data: str) -> str:
    """The JSON text that `--data` names: itself, a file after `@`, or standard input."""
    try:
        if data == "-":
            text = sys.stdin.buffer.read().decode()
        else:
            text = Path(data[1:]).read_bytes().decode() if data.startswith("@") else data
        json.loads(text, parse_int=str, parse_float=str)  # a mistake is better found here than sent
    except OSError as exc:
        raise Failed(f"cannot read {data[1:]}: {exc.strerror}") from exc
    except (ValueError, RecursionError):
        raise BadUsage(f"--data is not JSON: {data[:40]!r}; a text needs quotes, as in '\"done\"'") from None
    return text


def _route(kind: str, key: str) -> str:
    return f"/v1/state/{ROUTES[kind]}/{quote(os.fsencode(key), safe='')}"


def _show(args: argparse.Namespace, body: str) -> None:
    """For people indented, with every number as it came."""
    show(body if "json" in args else _indented(body))


def _indented(body: str) -> str:
    """The document over several lines. Its texts are not touched, so neither are its numbers."""
    lines, depth, position = [""], 0, 0
    while position < len(body):
        char = body[position]
        if char == '"':
            end = position + 1
            while body[end] != '"':
                end += 2 if body[end] == "\\" else 1
            lines[-1] += quoted(json.loads(body[position : end + 1]))
            position = end
        elif char in "[{":
            closing = body[position + 1 :].lstrip()[:1]
            if closing in "]}":
                lines[-1] += char + closing
                position = body.index(closing, position)
            else:
                depth += 1
                lines[-1] += char
                lines.append("  " * depth)
        elif char in "]}":
            depth -= 1
            lines.append("  " * depth + char)
        elif char == ",":
            lines[-1] += char
            lines.append("  " * depth)
        elif char == ":":
            lines[-1] += ": "
        elif not char.isspace():
            lines[-1] += char
        position += 1
    return "\n".join(lines)
