"""A control plane that only counts: takes batches of log entries and tells how many lines came, and when.

`python -m tests.bench.sink PORT FORMAT`, FORMAT being `json` (an array) or `lines` (one entry a line). GET / answers
with the count and the times of the first and the last batch.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    lines = 0
    first = last = 0.0
    is_json = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        Sink.first = Sink.first or time.monotonic()
        Sink.lines += body.count(b'"message":') if Sink.is_json else body.count(b"\n")
        Sink.last = time.monotonic()
        self._answer(202, b"")

    def do_GET(self) -> None:
        self._answer(200, json.dumps([Sink.lines, Sink.first, Sink.last]).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


if __name__ == "__main__":
    Sink.is_json = sys.argv[2] == "json"
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Sink).serve_forever()
