"""The lab's control plane as a process of its own, driven through its admin socket."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx

START_SECONDS = 30.0


class Plane:
    """A context manager. `inside` are the words that run a command in a namespace; `output` is all it ever printed."""

    def __init__(self, directory: Path, *options: str, listen: str = "127.0.0.1:0", inside: Sequence[str] = ()) -> None:
        self.output = directory / "controlplane.log"
        self._socket = directory / "admin.sock"
        self._command = [
            *inside, sys.executable, "-m", "plexd", "lab", "controlplane", "--http", "--listen", listen,
            "--admin-socket", str(self._socket), *options,
        ]  # fmt: skip
        self._admin = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self._socket)), base_url="http://admin", timeout=60, trust_env=False
        )

    def __enter__(self) -> Self:
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self._wait_until_it_serves()
        return self

    def __exit__(self, *_: object) -> None:
        self._admin.close()
        self._process.terminate()
        self._process.wait(20)

    def _wait_until_it_serves(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while "serving" not in self.output.read_text():
            assert self._process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, "the control plane did not start"
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        return next(line.split()[1] for line in self.output.read_text().splitlines() if line.startswith("url:"))

    def ask(self, method: str, path: str, order: Any = None, **query: str) -> Any:
        answer = self._admin.request(method, path, json=order, params=query)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def issue_token(self) -> str:
        return str(self.ask("POST", "/tokens")["token"])

    def nodes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("GET", "/nodes")
        return found

    def inject(self, **fault: Any) -> None:
        self.ask("POST", "/faults", fault)

    def arrivals(self, endpoint: str, after: int = 0) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("GET", "/arrivals", endpoint=endpoint, after=str(after))
        return found

    def wait_for(self, endpoint: str, timeout: float = 20.0, **order: Any) -> list[dict[str, Any]]:
        """The first arrivals that fit; see the admin API."""
        found: list[dict[str, Any]] = self.ask(
            "POST", "/arrivals/wait", {"endpoint": endpoint, "timeout_seconds": timeout} | order
        )
        return found

    def last_number(self) -> int:
        """Of the arrivals so far."""
        numbers = [arrival["number"] for arrival in self.ask("GET", "/arrivals")]
        return max(numbers, default=0)
