"""`plexd`: reads the command line, runs one command, turns errors into one line and an exit code.

The commands are told here with their help; the module of a command is imported when it runs, so that `--help` and
`--version` answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

from plexd import __version__
from plexd.errors import ConfigError, FatalError, PlexdError

COMMIT, BUILT = "none", "unknown"  # a release build writes its own here

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
UP = """\
Run the agent in the foreground until SIGTERM or Ctrl-C. It registers first if this machine never did, brings the mesh
up from what it last knew, and then follows the control plane. Stopping it leaves the mesh up (mesh.keep_on_stop).
"""
JOIN = """\
Register this machine with the control plane and exit; `up` uses what it leaves in the data directory. Prints the node
id and the mesh address. A machine that is registered already is left as it is.
The bootstrap token is looked for in this order: standard input (--token-stdin) or token.value, the token file, the
environment variable PLEXD_BOOTSTRAP_TOKEN.
"""
JOIN_EXAMPLES = """\
examples:
  plexd join --api https://cp.example.net --token-file /run/token
  pass show mesh/token | plexd join --api https://cp.example.net --token-stdin
"""
DOWN = """\
Take the mesh interface with its peers and routes down, and stop the daemon first where systemd runs it. The machine
stays registered: the next `up` brings everything back.
"""
DEREGISTER = """\
Take this machine out of the mesh for good: tell the control plane, take the interface down, delete the keys. Joining
again needs a new bootstrap token.
"""
STATUS = """\
Ask the daemon how this node is: connected or not and why, mesh, control plane, what it holds. With --json the answer
as it came, for programs.
"""
PEERS = """\
Ask the daemon for every peer: where it is, when it last shook hands, how much was sent and received; which way its
packets go and who named the endpoint (state, event, report; roamed: its own packets did); and if it is not connected,
why not. With --json the answer as it came, with a remedy for each obstacle.
"""
POLICIES = """\
Ask the daemon for the policies in force: every rule in its order, the first that fits a packet decides. Packets and
bytes count what met the rule here since it was put in force; a note says why a rule does nothing on this node. With
--json the answer as it came.
"""
DELIVERY = """\
Ask the daemon how {what} get to the control plane: whether they are taken, how many wait, how many were dropped and
why, and what each source does. With --json the answer as it came, with all counters.
"""
PIPELINES = (  # command, route, what it is about
    ("metrics-status", "/v1/metrics/status", "metrics"),
    ("log-status", "/v1/log-status", "logs"),
    ("audit", "/v1/audit/status", "audit events"),
)
STATE = """\
What programs on this node read and write: metadata and data from the control plane, names of secrets, reports. Without
a subcommand a summary of all of it, as JSON.
"""
STATE_GET = """\
Print one entry as JSON. Reading a secret asks the control plane for it; only root and the group plexd-secrets may.
"""
STATE_REPORT = """\
Write a report for the control plane, or delete it. The daemon keeps it until it is delivered.
"""
STATE_EXAMPLES = """\
examples:
  plexd state get metadata region
  plexd state get secret db-pass --raw
  plexd state report backup-state --data '{"ok": true}'
  df --output=pcent / | tail -1 | jq -R . | plexd state report disk --data - --if-match 3
exit codes: 0 done   1 refused or failed   3 daemon not reachable   4 no such entry
"""
WHY = """\
Say everything about one peer, by its id, mesh address or host name: whether it is connected, which way, what endpoints
it was ever said to have, handshake and traffic. The last lines name the reason and what to do.
"""
WHY_EXAMPLES = """\
exit codes: 0 connected   1 not connected   3 daemon not reachable   4 no such peer
"""
DOCTOR = """\
Look at everything the daemon needs, without one: capabilities, WireGuard or TUN, nftables, IPv6, the port, the data
directory, the token, and the way to the control plane: DNS, connection, TLS, clock, packet size. One line for each
thing that is wrong, with its cause and what to do.
"""
DOCTOR_EXAMPLES = """\
exit codes: 0 nothing is wrong   1 something is
Run it as the daemon runs: as root, in its container.
"""
DIAGNOSTICS = """\
Write an archive for whoever is to help: status, peers, health, the configuration without its secrets, the last log
lines, interfaces, routes, the firewall table, versions. It names peers and addresses, so it is readable for its owner
only; it works without the daemon as well, with what there is then.
"""
COMPLETION = """\
Print a script that has the shell complete plexd's command line.
"""
COMPLETION_EXAMPLES = """\
examples:
  plexd completion bash > /etc/bash_completion.d/plexd
  plexd completion zsh > /usr/local/share/zsh/site-functions/_plexd
  plexd completion fish > ~/.config/fish/completions/plexd.fish
"""
RECONCILE = """\
Have the daemon compare the node with the control plane's state now, instead of at its next interval. Needs root.
"""
RELOAD = """\
Have the daemon read its configuration again. It says which keys changed and which wait for a restart; a configuration
with a mistake changes nothing. Needs root; `systemctl reload plexd` does the same without an answer.
"""
HEALTH = """\
Ask whether the daemon lives, or with --ready whether the node is ready: prints ok, or the reason why not. Made for
health checks of containers.
"""
HEALTH_EXAMPLES = """\
exit codes: 0 ok   1 not
reasons: registration_pending, mesh_down, event_delivery_stopped, subsystem_stopped
"""
QUERY_EXAMPLES = """\
exit codes: 0 answered   1 refused or failed   3 daemon not reachable
Root may ask, and members of the group plexd.
"""
CONFIG = "Look at the configuration without starting anything."
CHECK = """\
Read the configuration as `up` does, from PATH or where it usually is, and say `ok` or what is wrong with it, one line
for each mistake: <file>:<line>: <key>: <problem>. Warnings do not change the exit code.
"""
SHOW = """\
Print the configuration in force, defaults included, as YAML (as JSON with --json). Secrets are replaced.
"""
LAB = """\
Try plexd on this machine alone: a control plane made for experiments and tests, and nodes in network namespaces.
"""
LAB_UP = """\
Start a control plane and N real agents, each in a network namespace of its own, and show what they do: register, reach
each other through the tunnels, heal a mesh that was damaged by hand, survive the loss of an agent. Everything is
taken down at the end, also after Ctrl-C. Needs root.
"""
LAB_POLICIES = """\
Print the policies of all nodes as JSON, or replace them by those in FILE; the nodes are told at once. The control
plane of `plexd lab up --keep` is asked, or the one whose --admin-socket is given.
"""
LAB_POLICIES_EXAMPLES = """\
examples:
  plexd lab policies
  echo '[{"id": "web", "rules": [{"src": "*", "dst": "10.100.0.2", "port": 443, "protocol": "tcp",
    "action": "allow"}]}]' | plexd lab policies -
"""
LAB_CONTROLPLANE = """\
Run the control plane of the lab in the foreground: all endpoints, checked requests, signed events, kept in memory. For
experiments, and for whoever writes a control plane. Not for production. Prints its URL, its CA and a bootstrap token.
"""
LAB_CONTROLPLANE_EXAMPLES = """\
examples:
  plexd lab controlplane
  PLEXD__TLS__CA_FILE=/tmp/plexd-lab-tls/ca.pem plexd join --api https://127.0.0.1:8443 --token-stdin --data-dir /tmp/n1
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong and where help is, in two lines instead of a usage dump."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            **options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"plexd: {message}\ntry: {self.prog} --help\n")


def parser() -> Parser:
    """The whole command line. A flag that is not given leaves no trace, so that it cannot overrule the file."""
    top = Parser(prog="plexd", description=OVERVIEW, epilog=EXAMPLES)
    _global_flags(top)
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    _command(commands, "up", aliases=["run"], runs="plexd.cli.node:up", summary="run the agent", description=UP)

    join = _command(
        commands,
        "join",
        runs="plexd.cli.node:join",
        summary="register this machine and exit",
        description=JOIN,
        examples=JOIN_EXAMPLES,
    )
    join.add_argument(
        "--token-file",
        dest="token.file",
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="file that holds the bootstrap token",
    )
    join.add_argument("--token-stdin", action="store_true", help="read the bootstrap token from standard input")
    join.add_argument("--force", action="store_true", help="register anew; the old identity is moved aside")

    _command(
        commands,
        "down",
        runs="plexd.cli.node:down",
        summary="take the mesh down, stay registered",
        description=DOWN,
    )

    deregister = _command(
        commands,
        "deregister",
        runs="plexd.cli.node:deregister",
        summary="leave the mesh for good",
        description=DEREGISTER,
    )
    deregister.add_argument("--purge", action="store_true", help="delete all local data and the token file as well")
    deregister.add_argument("--force", action="store_true", help="go on when the control plane does not answer")
    deregister.add_argument("--yes", action="store_true", help="do not ask before --purge")

    status = _command(
        commands,
        "status",
        runs="plexd.cli.query:status",
        summary="how this node is",
        description=STATUS,
        examples=QUERY_EXAMPLES,
    )
    status.add_argument("--watch", action="store_true", help="again every 2 seconds, until Ctrl-C")
    _command(
        commands,
        "peers",
        runs="plexd.cli.query:peers",
        summary="who this node is connected with, and why not",
        description=PEERS,
        examples=QUERY_EXAMPLES,
    )
    for name, route, what in PIPELINES:
        delivery = _command(
            commands,
            name,
            runs="plexd.cli.query:pipeline",
            summary=f"how {what} get to the control plane",
            description=DELIVERY.format(what=what),
            examples=QUERY_EXAMPLES,
        )
        delivery.set_defaults(route=route)

    why = _command(
        commands,
        "why",
        runs="plexd.cli.why:why",
        summary="why a peer is connected or not",
        description=WHY,
        examples=WHY_EXAMPLES,
    )
    why.add_argument("peer", metavar="PEER", help="its id, mesh address or host name")
    _command(
        commands,
        "doctor",
        runs="plexd.cli.doctor:doctor",
        summary="what is missing on this machine",
        description=DOCTOR,
        examples=DOCTOR_EXAMPLES,
    )
    diagnostics = _command(
        commands,
        "diagnostics",
        runs="plexd.cli.diagnostics:diagnostics",
        summary="an archive for whoever is to help",
        description=DIAGNOSTICS,
    )
    diagnostics.add_argument(
        "--output", metavar="PATH", help="where to write it (default: plexd-diagnostics-HOST-TIME.tar.gz here)"
    )
    _state_commands(commands)
    _command(
        commands,
        "reconcile",
        runs="plexd.cli.control:reconcile",
        summary="compare with the control plane now",
        description=RECONCILE,
    )
    _command(
        commands,
        "reload",
        runs="plexd.cli.control:reload",
        summary="read the configuration again",
        description=RELOAD,
    )
    health = _command(
        commands,
        "health",
        runs="plexd.cli.control:health",
        summary="whether the daemon lives, for health checks",
        description=HEALTH,
        examples=HEALTH_EXAMPLES,
    )
    health.add_argument("--ready", action="store_true", help="whether the node is ready, not only alive")
    health.add_argument(
        "--timeout", metavar="D", type=_seconds, default=3.0, help="how long to wait for the answer (default: 3s)"
    )
    _command(
        commands,
        "policies",
        runs="plexd.cli.query:policies",
        summary="who may talk to whom, and what each rule has met",
        description=POLICIES,
        examples=QUERY_EXAMPLES,
    )

    config = _group(commands, "config", summary="check and show the configuration", description=CONFIG)
    check = _command(
        config,
        "check",
        runs="plexd.cli.config:check",
        summary="say what is wrong with a configuration",
        description=CHECK,
    )
    check.add_argument("path", metavar="PATH", nargs="?", help="the file; without it the one that `up` would read")
    show = _command(config, "show", runs="plexd.cli.config:show", summary="print what is in force", description=SHOW)
    show.add_argument(
        "--origin", action="store_true", help="add where each value came from: file and line, variable, flag"
    )

    lab = _group(commands, "lab", summary="a mesh on this machine alone, to try and to test", description=LAB)
    lab_up = _command(
        lab,
        "up",
        runs="plexd.cli.lab:up",
        summary="control plane and nodes in network namespaces",
        description=LAB_UP,
    )
    lab_up.add_argument("--nodes", metavar="N", type=int, default=3, help="how many nodes (default: 3)")
    lab_up.add_argument(
        "--nat",
        choices=("none", "full-cone", "symmetric"),
        default="none",
        help="put each node behind a NAT of this kind; with symmetric the first one stays in the open (default: none)",
    )
    lab_up.add_argument("--ipv6", action="store_true", help="IPv6 alone, between the nodes and in the mesh")
    lab_up.add_argument("--keep", action="store_true", help="leave the mesh up until Ctrl-C")
    lab_policies = _command(
        lab,
        "policies",
        runs="plexd.cli.lab:policies",
        summary="show or set the policies of a lab that runs",
        description=LAB_POLICIES,
        examples=LAB_POLICIES_EXAMPLES,
    )
    lab_policies.add_argument("file", metavar="FILE", nargs="?", help="the new policies, - for standard input")
    lab_policies.add_argument(
        "--admin-socket",
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="of the control plane (default: that of plexd lab up)",
    )
    control_plane = _command(
        lab,
        "controlplane",
        runs="plexd.cli.lab:controlplane",
        summary="the control plane alone",
        description=LAB_CONTROLPLANE,
        examples=LAB_CONTROLPLANE_EXAMPLES,
    )
    for name, metavar, text in (
        ("listen", "HOST:PORT", "where it serves (default: 127.0.0.1:8443)"),
        ("tls-dir", "PATH", "where its CA and certificate are kept (default: /tmp/plexd-lab-tls)"),
        ("mesh-cidr", "CIDR", "the addresses it gives to nodes"),
        ("admin-socket", "PATH", "Unix socket to change its state, emit events and inject faults (default: none)"),
        ("state-file", "PATH", "file that outlives a restart (default: all in memory)"),
    ):
        control_plane.add_argument(f"--{name}", metavar=metavar, default=argparse.SUPPRESS, help=text)
    control_plane.add_argument("--http", action="store_true", default=argparse.SUPPRESS, help="serve without TLS")
    control_plane.add_argument(
        "--token",
        dest="tokens",
        metavar="TOKEN",
        action="append",
        default=argparse.SUPPRESS,
        help="a bootstrap token to accept, may be repeated (default: one is made up and printed)",
    )
    control_plane.add_argument(
        "--stun",
        metavar="HOST:PORT",
        action="append",
        default=argparse.SUPPRESS,
        help="answer STUN there as well; give two addresses, by which nodes tell kinds of NAT apart (default: none)",
    )
    completion = _command(
        commands,
        "completion",
        runs="plexd.cli.completion:completion",
        summary="have the shell complete plexd",
        description=COMPLETION,
        examples=COMPLETION_EXAMPLES,
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    return top


def _state_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    state = _command(
        commands,
        "state",
        runs="plexd.cli.state:summary",
        summary="metadata, data, secrets and reports",
        description=STATE,
        examples=STATE_EXAMPLES,
    )
    kinds = state.add_subparsers(title="commands", metavar="COMMAND")
    get = _command(
        kinds,
        "get",
        runs="plexd.cli.state:get",
        summary="print one entry",
        description=STATE_GET,
        examples=STATE_EXAMPLES,
    )
    get.add_argument("kind", choices=("metadata", "data", "report", "secret"), help="what kind of entry")
    get.add_argument("key", metavar="KEY")
    get.add_argument("--raw", action="store_true", help="print the value of a secret and nothing else")
    report = _command(
        kinds,
        "report",
        runs="plexd.cli.state:report",
        summary="write a report, or delete it",
        description=STATE_REPORT,
        examples=STATE_EXAMPLES,
    )
    report.add_argument("key", metavar="KEY")
    what = report.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="JSON", help="the payload: JSON, @FILE, or - for standard input")
    what.add_argument("--delete", action="store_true", help="delete it")
    report.add_argument("--content-type", metavar="TYPE", help="of the payload (default: application/json)")
    report.add_argument("--if-match", metavar="N", help="only if this is the version now; 0: if there is none")


def _seconds(text: str) -> float:
    from plexd.wire.durations import parse_duration  # noqa: PLC0415 - only who gives one pays

    seconds = parse_duration(text)
    if not seconds:
        raise ValueError
    return seconds


def _global_flags(parser: Parser) -> None:
    """Before and after the command. SUPPRESS keeps the second parser from overwriting what the first one found."""
    flags = parser.add_argument_group("flags for every command")
    for name, metavar, text in (
        ("config", "PATH", "configuration file (default: /etc/plexd/config.yaml)"),
        ("api", "URL", "control plane, such as https://cp.example.net"),
        ("mode", "MODE", "node"),
        ("log-level", "LEVEL", "debug, info, warn or error"),
        ("log-format", "FORMAT", "auto, console, json or journal"),
        ("data-dir", "PATH", "identity, keys and last known state"),
    ):
        flags.add_argument(
            f"--{name}", dest=name.replace("-", "_"), metavar=metavar, default=argparse.SUPPRESS, help=text
        )
    flags.add_argument(
        "--socket",
        dest="node_api.socket",
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="where the daemon answers (default: /var/run/plexd/api.sock)",
    )
    flags.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="machine-readable output")
    version = f"plexd version {__version__}\ncommit: {COMMIT}\nbuilt: {BUILT}"
    flags.add_argument("--version", action="version", version=version, help="print the version and exit")
    flags.add_argument("-h", "--help", action="help", help="print this help and exit")


def _command(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    *,
    runs: str,
    summary: str,
    description: str,
    examples: str = "",
    aliases: Sequence[str] = (),
) -> Parser:
    parser = commands.add_parser(name, aliases=aliases, help=summary, description=description, epilog=examples)
    parser.set_defaults(runs=runs)
    _global_flags(parser)
    return parser


def _group(
    commands: argparse._SubParsersAction[Parser], name: str, *, summary: str, description: str
) -> argparse._SubParsersAction[Parser]:
    parser = commands.add_parser(name, help=summary, description=description)
    _global_flags(parser)
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments`, by default this process's own; returns the exit code."""
    top = parser()
    args = top.parse_args(arguments)
    if "runs" not in args:
        top.print_help()
        return 0
    module, _, function = args.runs.partition(":")
    try:
        run = cast("Callable[[argparse.Namespace], int]", getattr(importlib.import_module(module), function))
        code = run(args)
        sys.stdout.flush()
    except ConfigError as exc:
        say(*exc.problems)
        return exc.exit_code
    except FatalError as exc:
        say(f"plexd: {exc}")
        return exc.exit_code
    except PlexdError as exc:
        say(f"plexd: {exc}")
        return 1
    except BrokenPipeError:  # whoever read our output has enough; the interpreter's own flush must not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def say(*lines: str) -> None:
    """To stderr; under systemd with the priority of an error, so that the journal shows it as one."""
    prefix = ""
    if "JOURNAL_STREAM" in os.environ:  # a person at a terminal does not wait for the log to load
        from plexd.log import PRIORITIES, detect_format  # noqa: PLC0415

        prefix = f"<{PRIORITIES['error']}>" if detect_format(sys.stderr, os.environ) == "journal" else ""
    from plexd.masking import mask  # noqa: PLC0415 - only who has something to say pays

    for line in lines:
        print(prefix + mask(line), file=sys.stderr)
