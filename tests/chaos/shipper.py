"""The telemetry of an agent as a process of its own: real engine, sources and client; no mesh. Made to be killed.

`python -m tests.chaos.shipper CONFIG NODE_ID NODE_KEY_FILE`. Waiting times are those of a short life.
"""

from __future__ import annotations

import asyncio
import signal
import ssl
import sys
from pathlib import Path

from pydantic import SecretStr

from plexd import log as logging
from plexd.audit import grouping as records_to_events
from plexd.config.load import load
from plexd.config.models import Config
from plexd.control import ControlPlane
from plexd.linux import host, tail
from plexd.masking import register_secret
from plexd.mesh.address import parse_ip
from plexd.mesh.desired import Desired
from plexd.mesh.observed import Observed
from plexd.mesh.target import Target
from plexd.node.control_calls import SelfDescription
from plexd.node.health import Health
from plexd.node.state import Node
from plexd.runtime.supervisor import Supervisor
from plexd.store import cursors
from plexd.store.identity import Identity
from plexd.telemetry import assembly, files, gaps, pipeline, reaction


class NoMesh:
    async def look(self) -> tuple[Target | None, Observed | None]:
        return None, None


def hurry() -> None:
    pipeline.BACKOFF_FIRST_SECONDS, pipeline.BACKOFF_LAST_SECONDS = 0.05, 0.4
    reaction.REFUSED_SECONDS = 0.3
    tail.AFTERGLOW_SECONDS, tail.HELD_SECONDS = 0.3, 2.0
    records_to_events.WAIT_SECONDS = 0.3
    files.KEPT_SECONDS, files.UNFINISHED_SECONDS = 0.3, 2.0
    gaps.SPACING_SECONDS = 0.5
    cursors.SPACING_SECONDS = 0.1


async def main(config: Config, node_id: str, key: SecretStr) -> None:
    register_secret(key.get_secret_value())
    node = Node(Identity(node_id, parse_ip("10.100.0.1"), key, None), Desired(), 0.0, Health())
    description = SelfDescription(config.hostname or "", {}, "0", "")
    control = ControlPlane(config.api or "", ssl.create_default_context())
    control.use_identity(lambda: node_id, node.credential, node.suspect)
    telemetry = assembly.Telemetry(lambda: config, control, description, node.accepted)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    services = [*telemetry.early_services, *telemetry.component(node, NoMesh()).services]
    running = asyncio.create_task(Supervisor(lambda _: None).run(services))
    print("ready", flush=True)
    await stop.wait()
    running.cancel()
    await asyncio.wait({running})
    await telemetry.finish(asyncio.Event())
    await control.close()


if __name__ == "__main__":
    host.prepare_process()
    logging.set_up("info", "json")
    hurry()
    config_file, node_id, key_file = sys.argv[1:]
    asyncio.run(main(load({"config": config_file}, {}).config, node_id, SecretStr(Path(key_file).read_text())))
