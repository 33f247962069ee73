"""The audit side of the daemon, without a mesh, as a process to be killed; its argument is a configuration.

It runs in the host's network namespace, where records are heard; a whole agent would make an interface there.
"""

from __future__ import annotations

import asyncio
import sys

from plexd import log
from plexd.config.load import load
from plexd.identity.enrolment import describe, make_control_plane
from plexd.store.files import DataDirectory
from plexd.store.identity import IdentityStore
from plexd.telemetry.assembly import Telemetry


async def main(path: str) -> None:
    config = load({"config": path}, {}).config
    log.set_up(config.log_level, "json")
    directory = DataDirectory(config.data_dir)
    identity = IdentityStore(directory).load()
    assert identity is not None
    control = make_control_plane(config)
    control.use_identity(lambda: identity.node_id, lambda: identity.node_key, lambda _: None)
    accepted = asyncio.Event()
    accepted.set()
    telemetry = Telemetry(lambda: config, control, describe(config), accepted)
    async with asyncio.TaskGroup() as group:
        for service in telemetry.early_services:
            group.create_task(service.run())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
