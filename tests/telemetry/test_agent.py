"""A real agent and a real control plane: what arrives, and what the agent says of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.world import MARKS, PLEXD, World, wait_until
from tests.telemetry.journald import MARKS as JOURNAL
from tests.telemetry.journald import Journald

pytestmark = MARKS

OBSERVE = """\
observe:
  interval: 5s
  batch_interval: 5s
"""
LOGS = """\
logs:
  interval: 1s
  batch_interval: 1s
  journald: {{enabled: false}}
  file_patterns: ["{logs}/*.log"]
"""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    logs = tmp_path / "log"
    logs.mkdir()
    (logs / "app.log").touch()
    with World(tmp_path, extra=OBSERVE + LOGS.format(logs=logs)) as world:
        world.register()
        yield world


def points(world: World) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = world.plane.ask("GET", f"/nodes/{world.node_id}/telemetry/metrics")
    return found


def ask(world: World, *command: str) -> str:
    socket = str(world.directory / "api.sock")
    done = subprocess.run([*PLEXD, *command, "--socket", socket], check=True, capture_output=True, text=True)
    return done.stdout


def test_points_of_all_groups_arrive_and_the_status_tells(world: World) -> None:
    groups = {"system", "tunnel", "latency", "agent"}
    wait_until("points of every group", lambda: groups <= {point["group"] for point in points(world)})
    wait_until(
        "every peer has its points",
        lambda: (
            {"n_2", "n_3", "n_4"} <= {point.get("peer_id") for point in points(world) if point["group"] == "tunnel"}
        ),
    )
    refused = [a for a in world.plane.arrivals("metrics") if a["status"] != 202]
    assert refused == []
    status = json.loads(ask(world, "metrics-status", "--json"))
    assert (status["enabled"], status["state"], status["counters"]["dropped"]) == (True, "ok", {})
    assert {source["name"]: source["state"] for source in status["sources"]} == dict.fromkeys(groups, "reading")
    assert "State:         ok" in ask(world, "metrics-status")
    assert world.end_agent() == 0
    sent = world.plane.arrivals("metrics")
    assert sent
    (agent, *_) = [point for point in points(world) if point["group"] == "agent"]
    assert agent["data"]["pipelines"].keys() >= {"metrics"}


def test_agent_that_is_stopped_sends_what_it_has(world: World) -> None:
    wait_until("metrics flow", lambda: points(world))
    before = len(points(world))
    assert world.end_agent() == 0
    assert len(points(world)) >= before
    world.plane.ask("POST", "/listener/stop")
    world.start_agent()
    wait_until("the agent runs", lambda: world.said("plexd started")[1:])
    assert world.end_agent() == 0


def test_killed_agent_goes_on_where_it_was_and_keeps_secrets_to_itself(world: World) -> None:
    """T2, and redaction: what a restarted agent still knows, node key and private key."""
    log = world.directory / "log" / "app.log"
    data = world.data
    identity = json.loads((data / "identity.json").read_text())
    secrets = [(data / name).read_text().strip() for name in ("node_secret_key", "private_key")]
    assert identity["node_id"] == world.node_id

    def forwarded() -> list[str]:
        entries = world.plane.ask("GET", f"/nodes/{world.node_id}/telemetry/logs")
        return [entry["message"] for entry in entries if entry["source"] == str(log)]

    wait_until("the file is followed", lambda: "files" in (data / "telemetry" / "cursors.json").read_text())
    with log.open("a") as file:
        file.writelines(f"line {number}\n" for number in range(100))
        file.writelines(f"secret {secret} planted\n" for secret in secrets)
    wait_until("the lines arrive", lambda: len(forwarded()) >= 102)
    world.end_agent(signal.SIGKILL)
    with log.open("a") as file:
        file.writelines(f"line {number}\n" for number in range(100, 200))
    world.start_agent()
    wait_until("the other lines arrive", lambda: "line 199" in forwarded())
    arrived = forwarded()
    assert [f"line {n}" for n in range(200)] == list(dict.fromkeys(text for text in arrived if text.startswith("line")))
    assert "secret [redacted] planted" in arrived
    assert not any(secret in text for text in arrived for secret in secrets)
    status = json.loads(ask(world, "log-status", "--json"))
    assert {source["name"] for source in status["sources"]} == {"files", "agent"}
    assert "files" in ask(world, "log-status")


EVERYTHING = """\
observe: {{interval: 5s, batch_interval: 5s}}
logs:
  interval: 1s
  batch_interval: 1s
  journald: {{directory: "{journal}"}}
  file_patterns: ["{root}/log/*.log"]
audit:
  interval: 1s
  batch_interval: 1s
  auditd: {{enabled: false}}
  kubernetes: {{enabled: true, log_path: "{root}/k8s.log"}}
"""


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    with Journald(tmp_path / "journald") as journald:
        yield journald


@pytest.fixture
def make_world(tmp_path: Path, journald: Journald) -> Iterator[Callable[[str], World]]:
    """A world with every source there is, `extra` after its sections; a file and an audit log that are there."""
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "app.log").touch()
    (tmp_path / "k8s.log").touch()
    with contextlib.ExitStack() as worlds:

        def make(sections: str) -> World:
            extra = sections.format(root=tmp_path, journal=journald.directory)
            return worlds.enter_context(World(tmp_path, extra=extra))

        yield make


def taken(world: World, pipeline: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = world.plane.ask("GET", f"/nodes/{world.node_id}/telemetry/{pipeline}")
    return found


class TestEverySource:
    pytestmark = JOURNAL

    def test_own_secrets_are_redacted_wherever_they_turn_up(
        self, make_world: Callable[[str], World], journald: Journald
    ) -> None:
        """Bootstrap token, node key, private key: in the journal, a file, an audit record, the agent's own log."""
        world = make_world(EVERYTHING)
        token = world.plane.issue_token()
        world.put_token(token)
        world.start_agent()
        world.plane.wait_for("register", timeout=45)
        (node,) = world.plane.nodes()
        world.node_id = node["id"]
        wait_until("the event stream is open", world.streams)
        secrets = [token, *((world.data / name).read_text().strip() for name in ("node_secret_key", "private_key"))]
        assert len(set(secrets)) == 3
        with (world.directory / "log" / "app.log").open("a") as log, (world.directory / "k8s.log").open("a") as audit:
            for number, secret in enumerate(secrets):
                log.write(f"file {number}: {secret}\n")
                journald.write(f"journal {number}: {secret}")
                event = {"stage": "ResponseComplete", "verb": "get", "requestURI": f"/{number}"}
                audit.write(json.dumps(event | {"annotations": {"note": secret}}) + "\n")
                world.emit(f"odd {secret}")  # the agent's own log names the type of an event it does not know

        def arrived() -> tuple[list[str], list[str]]:
            messages = [entry["message"] for entry in taken(world, "logs")]
            return messages, [entry["raw"] for entry in taken(world, "audit") if entry["source"] == "k8s-audit"]

        def has_all() -> bool:
            messages, raw = arrived()
            planted = {f"{source} {n}: [redacted]" for source in ("file", "journal") for n in range(3)}
            own = sum("event_type" in text and "odd [redacted]" in text for text in messages)
            return planted <= set(messages) and own >= 3 and sum('"note":"[redacted]"' in text for text in raw) == 3

        wait_until("everything planted arrives redacted", has_all)
        messages, raw = arrived()
        assert not [
            text for text in (*messages, *raw, world.output.read_text()) if any(map(text.__contains__, secrets))
        ]

    @pytest.mark.parametrize("off", ["observe", "logs", "audit"])
    def test_pipeline_that_is_off_asks_nothing_keeps_nothing_and_says_so(
        self, make_world: Callable[[str], World], journald: Journald, off: str
    ) -> None:
        """T3: the others run."""
        commands = {"observe": "metrics-status", "logs": "log-status", "audit": "audit"}
        endpoints = {"observe": "metrics", "logs": "logs", "audit": "audit"}
        start = EVERYTHING.index(f"{off}:")
        sections = EVERYTHING[:start] + EVERYTHING[start:].replace("interval:", "enabled: false\n  interval:", 1)
        if off == "observe":
            sections = EVERYTHING.replace("observe: {{", "observe: {{enabled: false, ")
        world = make_world(sections)
        world.register()
        journald.write("line in the journal")
        with (world.directory / "k8s.log").open("a") as audit:
            audit.write('{"stage": "ResponseComplete", "verb": "get", "requestURI": "/1"}\n')
        others = {name for name in endpoints if name != off}
        wait_until("the others arrive", lambda: all(taken(world, endpoints[name]) for name in others))
        told = {name: json.loads(ask(world, command, "--json")) for name, command in commands.items()}
        assert {name: status["enabled"] for name, status in told.items()} == dict.fromkeys(others, True) | {off: False}
        assert (told[off]["state"], told[off]["sources"]) == ("disabled", [])
        assert "disabled" in ask(world, commands[off])
        assert world.end_agent() == 0
        assert world.plane.arrivals(endpoints[off]) == []
        kept = {path.name for path in (world.data / "telemetry").iterdir()}
        assert kept == {"cursors.json"} | ({"audit-spool"} if off != "audit" else set())
        sections_kept = json.loads((world.data / "telemetry" / "cursors.json").read_text()).keys()
        of_pipeline = {"observe": {"metrics_gaps"}, "logs": {"logs_gaps", "journald", "files"},
                       "audit": {"audit_gaps", "audit_spool", "k8s_audit"}}  # fmt: skip
        for name, members in of_pipeline.items():
            assert members.isdisjoint(sections_kept) if name == off else members <= sections_kept

    def test_changed_configuration_is_taken_up_without_a_restart(
        self, make_world: Callable[[str], World], journald: Journald
    ) -> None:
        world = make_world(EVERYTHING)
        world.register()
        more = world.directory / "more"
        more.mkdir()
        (more / "new.log").touch()

        def reload(*changes: tuple[str, str]) -> None:
            for old, new in changes:
                assert old in world._extra
                world._extra = world._extra.replace(old, new)
            world.write_config()
            answer = json.loads(ask(world, "reload", "--json"))
            assert answer["changed"]
            assert answer["restart_required"] == []

        def messages() -> list[str]:
            return [entry["message"] for entry in taken(world, "logs")]

        def enabled(command: str) -> bool:
            return bool(json.loads(ask(world, command, "--json"))["enabled"])

        def events() -> list[str]:
            found = [entry for entry in taken(world, "audit") if entry["source"] == "k8s-audit"]
            return [entry["object"]["uri"] for entry in found]

        def happen(*uris: str) -> None:
            with (world.directory / "k8s.log").open("a") as audit:
                for uri in uris:
                    event = {"stage": "ResponseComplete", "verb": uri.split("/")[1], "requestURI": uri}
                    audit.write(json.dumps(event) + "\n")

        patterns = f'["{world.directory}/log/*.log"]'
        journald.write("line 0")
        wait_until("the journal is read", lambda: "line 0" in messages())
        before = json.loads(ask(world, "log-status", "--json"))["counters"]["collected"]
        reload((patterns, f'["{more}/*.log"]\n  filter: {{min_severity: warning}}'))
        wait_until(
            "the other file is followed", lambda: str(more) in (world.data / "telemetry/cursors.json").read_text()
        )
        with (more / "new.log").open("a") as log:
            log.write("<6>not wanted any more\n<3>line 1\n")
        wait_until("the new file is read", lambda: "line 1" in messages())
        assert json.loads(ask(world, "log-status", "--json"))["counters"]["collected"] > before
        reload(("enabled: true, log_path", "enabled: true, exclude_verbs: [list], log_path"))
        rounds = itertools.count()

        def is_excluded() -> bool:
            number = next(rounds)
            happen(f"/list/{number}", f"/get/{number}")
            wait_until("the round is over", lambda: f"/get/{number}" in events())
            return f"/list/{number}" not in events()

        wait_until("a verb is excluded", is_excluded)

        commands = ("log-status", "metrics-status", "audit")
        reload(
            ("logs:\n", "logs:\n  enabled: false\n"),
            ("observe: {interval", "observe: {enabled: false, interval"),
            ("audit:\n", "audit:\n  enabled: false\n"),
        )
        wait_until("all are off", lambda: not any(map(enabled, commands)))
        journald.write("line 2", PRIORITY="3")
        happen("/get/meanwhile")
        points_before = len(taken(world, "metrics"))
        reload(("  enabled: false\n", ""), ("enabled: false, interval", "interval"))
        wait_until("the line of meanwhile arrives", lambda: "line 2" in messages())
        wait_until("the event of meanwhile arrives", lambda: "/get/meanwhile" in events())
        wait_until("metrics flow again", lambda: len(taken(world, "metrics")) > points_before)
        assert events().count("/get/0") == 1
        assert not [text for text in messages() if "not wanted" in text or "telemetry gap" in text]
        assert world.end_agent() == 0
        of_agent = [entry["event_type"] for entry in taken(world, "audit") if entry["source"] == "plexd"]
        assert of_agent == ["agent_started", "node_registered", "agent_stopped"]
