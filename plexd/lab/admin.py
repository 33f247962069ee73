"""The admin socket of a lab control plane, as the tour of the lab uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx

from plexd.lab.namespaces import LabError


class RegisteredNode(NamedTuple):
    node_id: str
    hostname: str
    mesh_ip: str
    endpoint: str
    nat_type: str


class Admin:
    """A connection; use it as a context manager. Every call raises LabError when the control plane does not answer."""

    def __init__(self, socket: Path) -> None:
        self._client = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://admin", timeout=10, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._client.close()

    def issue_token(self) -> str:
        return str(self._ask("POST", "/tokens")["token"])

    def nodes(self) -> list[RegisteredNode]:
        members = ("id", "hostname", "mesh_ip", "endpoint", "nat_type")
        return [RegisteredNode(*(node[member] for member in members)) for node in self._ask("GET", "/nodes")]

    def policies(self) -> list[Any]:
        """Those of all nodes, as a state pull gives them."""
        return list(self._ask("GET", "/policies"))

    def set_policies(self, policies: list[Any]) -> None:
        self._ask("PUT", "/policies", body={"policies": policies})

    def corrections(self, node_id: str) -> list[dict[str, str]]:
        """Every correction in the drift reports of a node, oldest first."""
        reports = self._ask("GET", "/arrivals", endpoint="drift", node=node_id)
        return [correction for report in reports for correction in report["body"]["corrections"]]

    def heartbeats(self, node_id: str) -> int:
        """How many have arrived."""
        return len(self._ask("GET", "/arrivals", endpoint="heartbeat", node=node_id))

    def _ask(self, method: str, path: str, *, body: Any = None, **query: str) -> Any:
        try:
            answer = self._client.request(method, path, params=query, json=body)
        except httpx.HTTPError as exc:
            raise LabError(f"the control plane's admin socket: {exc}") from exc
        if not answer.is_success:
            raise LabError(f"the control plane answers {answer.status_code}: {answer.text[:500]}")
        return answer.json() if answer.content else None
