"""`plexd doctor`: looks at everything the daemon needs, without one, and says what is wrong and what to do."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping

from plexd.config.load import load
from plexd.config.models import Config
from plexd.control.checks import check_control_plane
from plexd.errors import ConfigError, Problem
from plexd.identity.enrolment import make_tls_context
from plexd.linux import host_checks


def doctor(args: argparse.Namespace) -> int:
    problems = list(_examine(vars(args)))
    if "json" in args:
        print(json.dumps({"findings": [problem._asdict() for problem in problems]}))
    else:
        lines = [f"{check}: {cause}; {remedy}" for check, cause, remedy in problems]
        print("\n".join(lines or ["ok: nothing is missing"]))
    return 1 if problems else 0


def _examine(flags: Mapping[str, str]) -> Iterator[Problem]:
    yield from host_checks.check_capabilities()
    yield from host_checks.check_ipv6()
    try:
        config = load(flags, os.environ, command="doctor").config
    except ConfigError as exc:
        for problem in exc.problems:
            yield Problem("configuration", problem, "correct it; plexd config check")
        return
    yield from _examine_with(config)


def _examine_with(config: Config) -> Iterator[Problem]:
    mesh = config.mesh
    yield from host_checks.check_backend(mesh.backend, mesh.userspace_program, host_checks.has_kernel_wireguard())
    if config.policy.enabled:
        yield from host_checks.check_firewall()
    yield from host_checks.check_port(mesh.listen_port, mesh.interface)
    yield from host_checks.check_data_dir(config.data_dir)
    yield from _check_token(config)
    if config.api is None:
        yield Problem("configuration", "api is not set", "give --api URL, set PLEXD_API, or write it into the file")
    else:
        yield from check_control_plane(config.api, make_tls_context(config))


def _check_token(config: Config) -> Iterator[Problem]:
    token = config.token
    if (config.data_dir / "identity.json").exists() or token.value is not None or token.metadata.enabled:
        return
    if not token.file.exists() and not os.environ.get(token.env):
        cause = f"this node is not registered, and there is no bootstrap token in {token.file}"
        yield Problem("token", cause, "put a token there; the control plane gives them out")
