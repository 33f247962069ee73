"""The command line as data: every command with its help, its arguments and the function that runs it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Argument:
    """As argparse takes it: a position's name or a flag's names, and what there is to say of it."""

    names: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class OneOf:
    """Exactly one of these has to be given."""

    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class Command:
    """`runs` is `module:function`, imported when the command runs; where it is empty one of `commands` has to follow.

    `sets` are further attributes of what the function is given.
    """

    name: str
    summary: str
    description: str
    runs: str = ""
    arguments: tuple[Argument | OneOf, ...] = ()
    commands: tuple[Command, ...] = ()
    examples: str = ""
    aliases: tuple[str, ...] = ()
    sets: Mapping[str, str] = field(default_factory=dict)


def argument(*names: str, **options: Any) -> Argument:
    return Argument(names, options)


def switch(name: str, text: str) -> Argument:
    """False unless it is given."""
    return Argument((name,), {"action": "store_true", "help": text})


def setting(name: str, metavar: str, text: str, **options: Any) -> Argument:
    """A flag that leaves no trace when it is not given, so that it cannot overrule what is set elsewhere."""
    return Argument((name,), {"metavar": metavar, "default": argparse.SUPPRESS, "help": text, **options})


def _seconds(text: str) -> float:
    from plexd.wire.durations import parse_duration  # noqa: PLC0415 - only who gives one pays

    seconds = parse_duration(text)
    if not seconds:
        raise ValueError
    return seconds


OVERVIEW = """\
plexd joins this machine to a WireGuard mesh and keeps it there: it registers with the control plane once, then sets
up the interface, the peers and the routes that the control plane wants, and repairs what changes behind its back.
"""
EXAMPLES = """\
examples:
  plexd join --api https://cp.example.net --token-file ./token    register this machine
  plexd up                                                        run the agent (what systemd starts)
  plexd peers                                                     who is connected, and why not
  plexd config show --origin                                      what is configured, and where
  plexd lab up --nodes 3                                          a mesh to try, on this machine alone

exit codes:
  0 done   1 failed or refused   2 wrong usage   3 daemon not reachable   4 not found
  5 configuration missing or invalid   9 needs root
  of `up`, which systemd does not start again after 2, 5, 6 and 7:
  6 registration refused, or no bootstrap token   7 data directory unusable, or another daemon runs
  8 registration gave up after its time limit
"""
QUERY_EXAMPLES = """\
exit codes: 0 answered   1 refused or failed   3 daemon not reachable
Root may ask, and members of the group plexd.
"""
STATE_EXAMPLES = """\
examples:
  plexd state get metadata region
  plexd state get secret db-pass --raw
  plexd state report backup-state --data '{"ok": true}'
  df --output=pcent / | tail -1 | jq -R . | plexd state report disk --data - --if-match 3
exit codes: 0 done   1 refused or failed   3 daemon not reachable   4 no such entry
"""
GLOBAL_FLAGS = (
    setting("--config", "PATH", "configuration file (default: /etc/plexd/config.yaml)"),
    setting("--api", "URL", "control plane, such as https://cp.example.net"),
    setting("--mode", "MODE", "node"),
    setting("--log-level", "LEVEL", "debug, info, warn or error"),
    setting("--log-format", "FORMAT", "auto, console, json or journal"),
    setting("--data-dir", "PATH", "identity, keys and last known state"),
    setting("--socket", "PATH", "where the daemon answers (default: /var/run/plexd/api.sock)", dest="node_api.socket"),
    argument("--json", action="store_true", default=argparse.SUPPRESS, help="machine-readable output"),
)

UP = Command(
    "up",
    summary="run the agent",
    description="""\
Run the agent in the foreground until SIGTERM or Ctrl-C. It registers first if this machine never did, brings the mesh
up from what it last knew, and then follows the control plane. Stopping it leaves the mesh up (mesh.keep_on_stop).
""",
    runs="plexd.cli.node:up",
    aliases=("run",),
)
JOIN = Command(
    "join",
    summary="register this machine and exit",
    description="""\
Register this machine with the control plane and exit; `up` uses what it leaves in the data directory. Prints the node
id and the mesh address. A machine that is registered already is left as it is.
The bootstrap token is looked for in this order: standard input (--token-stdin) or token.value, the token file, the
environment variable PLEXD_BOOTSTRAP_TOKEN.
""",
    runs="plexd.cli.node:join",
    examples="""\
examples:
  plexd join --api https://cp.example.net --token-file /run/token
  pass show mesh/token | plexd join --api https://cp.example.net --token-stdin
""",
    arguments=(
        setting("--token-file", "PATH", "file that holds the bootstrap token", dest="token.file"),
        switch("--token-stdin", "read the bootstrap token from standard input"),
        switch("--force", "register anew; the old identity is moved aside"),
    ),
)
DOWN = Command(
    "down",
    summary="take the mesh down, stay registered",
    description="""\
Take the mesh interface with its peers and routes down, and stop the daemon first where systemd runs it. The machine
stays registered: the next `up` brings everything back.
""",
    runs="plexd.cli.node:down",
)
DEREGISTER = Command(
    "deregister",
    summary="leave the mesh for good",
    description="""\
Take this machine out of the mesh for good: tell the control plane, take the interface down, delete the keys. Joining
again needs a new bootstrap token.
""",
    runs="plexd.cli.node:deregister",
    arguments=(
        switch("--purge", "delete all local data and the token file as well"),
        switch("--force", "go on when the control plane does not answer"),
        switch("--yes", "do not ask before --purge"),
    ),
)
STATUS = Command(
    "status",
    summary="how this node is",
    description="""\
Ask the daemon how this node is: connected or not and why, mesh, control plane, what it holds. With --json the answer
as it came, for programs.
""",
    runs="plexd.cli.status:status",
    examples=QUERY_EXAMPLES,
    arguments=(switch("--watch", "again every 2 seconds, until Ctrl-C"),),
)
PEERS = Command(
    "peers",
    summary="who this node is connected with, and why not",
    description="""\
Ask the daemon for every peer: where it is, when it last shook hands, how much was sent and received; which way its
packets go and who named the endpoint (state, event, report; roamed: its own packets did); and if it is not connected,
why not. With --json the answer as it came, with a remedy for each obstacle.
""",
    runs="plexd.cli.query:peers",
    examples=QUERY_EXAMPLES,
)


def _delivery(name: str, route: str, what: str) -> Command:
    return Command(
        name,
        summary=f"how {what} get to the control plane",
        description=f"""\
Ask the daemon how {what} get to the control plane: whether they are taken, how many wait, how many were dropped and
why, and what each source does. With --json the answer as it came, with all counters.
""",
        runs="plexd.cli.query:pipeline",
        examples=QUERY_EXAMPLES,
        sets={"route": route},
    )


WHY = Command(
    "why",
    summary="why a peer is connected or not",
    description="""\
Say everything about one peer, by its id, mesh address or host name: whether it is connected, which way, what endpoints
it was ever said to have, handshake and traffic. The last lines name the reason and what to do.
""",
    runs="plexd.cli.why:why",
    examples="""\
exit codes: 0 connected   1 not connected   3 daemon not reachable   4 no such peer
""",
    arguments=(argument("peer", metavar="PEER", help="its id, mesh address or host name"),),
)
DOCTOR = Command(
    "doctor",
    summary="what is missing on this machine",
    description="""\
Look at everything the daemon needs, without one: capabilities, WireGuard or TUN, nftables, IPv6, the port, the data
directory, the token, and the way to the control plane: DNS, connection, TLS, clock, packet size. One line for each
thing that is wrong, with its cause and what to do.
""",
    runs="plexd.cli.doctor:doctor",
    examples="""\
exit codes: 0 nothing is wrong   1 something is
Run it as the daemon runs: as root, in its container.
""",
)
DIAGNOSTICS = Command(
    "diagnostics",
    summary="an archive for whoever is to help",
    description="""\
Write an archive for whoever is to help: status, peers, health, the configuration without its secrets, the last log
lines, interfaces, routes, the firewall table, versions. It names peers and addresses, so it is readable for its owner
only; it works without the daemon as well, with what there is then.
""",
    runs="plexd.cli.diagnostics:diagnostics",
    arguments=(
        argument(
            "--output", metavar="PATH", help="where to write it (default: plexd-diagnostics-HOST-TIME.tar.gz here)"
        ),
    ),
)
STATE_GET = Command(
    "get",
    summary="print one entry",
    description="""\
Print one entry as JSON. Reading a secret asks the control plane for it; only root and the group plexd-secrets may.
""",
    runs="plexd.cli.state:get",
    examples=STATE_EXAMPLES,
    arguments=(
        argument("kind", choices=("metadata", "data", "report", "secret"), help="what kind of entry"),
        argument("key", metavar="KEY"),
        switch("--raw", "print the value of a secret and nothing else"),
    ),
)
STATE_REPORT = Command(
    "report",
    summary="write a report, or delete it",
    description="""\
Write a report for the control plane, or delete it. The daemon keeps it until it is delivered.
""",
    runs="plexd.cli.state:report",
    examples=STATE_EXAMPLES,
    arguments=(
        argument("key", metavar="KEY"),
        OneOf(
            (
                argument("--data", metavar="JSON", help="the payload: JSON, @FILE, or - for standard input"),
                switch("--delete", "delete it"),
            )
        ),
        argument("--content-type", metavar="TYPE", help="of the payload (default: application/json)"),
        argument("--if-match", metavar="N", help="only if this is the version now; 0: if there is none"),
    ),
)
STATE = Command(
    "state",
    summary="metadata, data, secrets and reports",
    description="""\
What programs on this node read and write: metadata and data from the control plane, names of secrets, reports. Without
a subcommand a summary of all of it, as JSON.
""",
    runs="plexd.cli.state:summary",
    examples=STATE_EXAMPLES,
    commands=(STATE_GET, STATE_REPORT),
)
RECONCILE = Command(
    "reconcile",
    summary="compare with the control plane now",
    description="""\
Have the daemon compare the node with the control plane's state now, instead of at its next interval. Needs root.
""",
    runs="plexd.cli.control:reconcile",
)
RELOAD = Command(
    "reload",
    summary="read the configuration again",
    description="""\
Have the daemon read its configuration again. It says which keys changed and which wait for a restart; a configuration
with a mistake changes nothing. Needs root; `systemctl reload plexd` does the same without an answer.
""",
    runs="plexd.cli.control:reload",
)
HEALTH = Command(
    "health",
    summary="whether the daemon lives, for health checks",
    description="""\
Ask whether the daemon lives, or with --ready whether the node is ready: prints ok, or the reason why not. Made for
health checks of containers.
""",
    runs="plexd.cli.control:health",
    examples="""\
exit codes: 0 ok   1 not
reasons: registration_pending, mesh_down, event_delivery_stopped, subsystem_stopped
""",
    arguments=(
        switch("--ready", "whether the node is ready, not only alive"),
        argument(
            "--timeout", metavar="D", type=_seconds, default=3.0, help="how long to wait for the answer (default: 3s)"
        ),
    ),
)
POLICIES = Command(
    "policies",
    summary="who may talk to whom, and what each rule has met",
    description="""\
Ask the daemon for the policies in force: every rule in its order, the first that fits a packet decides. Packets and
bytes count what met the rule here since it was put in force; a note says why a rule does nothing on this node. With
--json the answer as it came.
""",
    runs="plexd.cli.query:policies",
    examples=QUERY_EXAMPLES,
)
CONFIG_CHECK = Command(
    "check",
    summary="say what is wrong with a configuration",
    description="""\
Read the configuration as `up` does, from PATH or where it usually is, and say `ok` or what is wrong with it, one line
for each mistake: <file>:<line>: <key>: <problem>. Warnings do not change the exit code.
""",
    runs="plexd.cli.config:check",
    arguments=(argument("path", metavar="PATH", nargs="?", help="the file; without it the one that `up` would read"),),
)
CONFIG_SHOW = Command(
    "show",
    summary="print what is in force",
    description="""\
Print the configuration in force, defaults included, as YAML (as JSON with --json). Secrets are replaced.
""",
    runs="plexd.cli.config:show",
    arguments=(switch("--origin", "add where each value came from: file and line, variable, flag"),),
)
CONFIG = Command(
    "config",
    summary="check and show the configuration",
    description="Look at the configuration without starting anything.",
    commands=(CONFIG_CHECK, CONFIG_SHOW),
)
LAB_UP = Command(
    "up",
    summary="control plane and nodes in network namespaces",
    description="""\
Start a control plane and N real agents, each in a network namespace of its own, and show what they do: register, reach
each other through the tunnels, heal a mesh that was damaged by hand, survive the loss of an agent. Everything is
taken down at the end, also after Ctrl-C. Needs root.
""",
    runs="plexd.cli.lab:up",
    arguments=(
        argument("--nodes", metavar="N", type=int, default=3, help="how many nodes (default: 3)"),
        argument(
            "--nat",
            choices=("none", "full-cone", "symmetric"),
            default="none",
            help="put each node behind a NAT of this kind; with symmetric the first one stays in the open "
            "(default: none)",
        ),
        switch("--ipv6", "IPv6 alone, between the nodes and in the mesh"),
        switch("--keep", "leave the mesh up until Ctrl-C"),
    ),
)
LAB_POLICIES = Command(
    "policies",
    summary="show or set the policies of a lab that runs",
    description="""\
Print the policies of all nodes as JSON, or replace them by those in FILE; the nodes are told at once. The control
plane of `plexd lab up --keep` is asked, or the one whose --admin-socket is given.
""",
    runs="plexd.cli.lab:policies",
    examples="""\
examples:
  plexd lab policies
  echo '[{"id": "web", "rules": [{"src": "*", "dst": "10.100.0.2", "port": 443, "protocol": "tcp",
    "action": "allow"}]}]' | plexd lab policies -
""",
    arguments=(
        argument("file", metavar="FILE", nargs="?", help="the new policies, - for standard input"),
        setting("--admin-socket", "PATH", "of the control plane (default: that of plexd lab up)"),
    ),
)
LAB_CONTROLPLANE = Command(
    "controlplane",
    summary="the control plane alone",
    description="""\
Run the control plane of the lab in the foreground: all endpoints, checked requests, signed events, kept in memory. For
experiments, and for whoever writes a control plane. Not for production. Prints its URL, its CA and a bootstrap token.
""",
    runs="plexd.cli.lab:controlplane",
    examples="""\
examples:
  plexd lab controlplane
  PLEXD__TLS__CA_FILE=/tmp/plexd-lab-tls/ca.pem plexd join --api https://127.0.0.1:8443 --token-stdin --data-dir /tmp/n1
""",
    arguments=(
        setting("--listen", "HOST:PORT", "where it serves (default: 127.0.0.1:8443)"),
        setting("--tls-dir", "PATH", "where its CA and certificate are kept (default: /tmp/plexd-lab-tls)"),
        setting("--mesh-cidr", "CIDR", "the addresses it gives to nodes"),
        setting(
            "--admin-socket",
            "PATH",
            "Unix socket to change its state, emit events and inject faults (default: none)",
        ),
        setting("--state-file", "PATH", "file that outlives a restart (default: all in memory)"),
        argument("--http", action="store_true", default=argparse.SUPPRESS, help="serve without TLS"),
        setting(
            "--token",
            "TOKEN",
            "a bootstrap token to accept, may be repeated (default: one is made up and printed)",
            dest="tokens",
            action="append",
        ),
        setting(
            "--stun",
            "HOST:PORT",
            "answer STUN there as well; give two addresses, by which nodes tell kinds of NAT apart (default: none)",
            action="append",
        ),
    ),
)
LAB = Command(
    "lab",
    summary="a mesh on this machine alone, to try and to test",
    description="""\
Try plexd on this machine alone: a control plane made for experiments and tests, and nodes in network namespaces.
""",
    commands=(LAB_UP, LAB_POLICIES, LAB_CONTROLPLANE),
)
COMPLETION = Command(
    "completion",
    summary="have the shell complete plexd",
    description="""\
Print a script that has the shell complete plexd's command line.
""",
    runs="plexd.cli.completion:completion",
    examples="""\
examples:
  plexd completion bash > /etc/bash_completion.d/plexd
  plexd completion zsh > /usr/local/share/zsh/site-functions/_plexd
  plexd completion fish > ~/.config/fish/completions/plexd.fish
""",
    arguments=(argument("shell", choices=("bash", "zsh", "fish")),),
)

COMMANDS = (  # in the order of the help
    UP,
    JOIN,
    DOWN,
    DEREGISTER,
    STATUS,
    PEERS,
    _delivery("metrics-status", "/v1/metrics/status", "metrics"),
    _delivery("log-status", "/v1/log-status", "logs"),
    _delivery("audit", "/v1/audit/status", "audit events"),
    WHY,
    DOCTOR,
    DIAGNOSTICS,
    STATE,
    RECONCILE,
    RELOAD,
    HEALTH,
    POLICIES,
    CONFIG,
    LAB,
    COMPLETION,
)
