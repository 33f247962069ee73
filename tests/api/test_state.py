"""Reading state through the node API: documents, keys, tags, revision and waiting for it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from plexd.api.routes import Right
from plexd.api.state import MAX_WAITING
from plexd.mesh.desired import Desired
from tests.api.asking import DESIRED, Place, play
from tests.virtual_time import run_virtual


def test_summary_has_everything_by_name(tmp_path: Path) -> None:
    async def scene(place: Place) -> None:
        await place.ask("PUT", "/v1/state/report/b", {"content_type": "text/plain", "payload": 1})
        await place.ask("PUT", "/v1/state/report/a", {"content_type": "text/plain", "payload": 1})
        answer = await place.ask("GET", "/v1/state")
        assert answer.status == 200
        assert answer.json == {
            "revision": 3,
            "metadata": {"region": "eu-1", "a/b": "slash"},
            "data_keys": [
                {"key": "big", "version": 1, "content_type": "text/plain"},
                {"key": "proxy", "version": 4, "content_type": "application/json"},
            ],
            "secret_keys": [],
            "report_keys": [{"key": "a", "version": 1}, {"key": "b", "version": 1}],
        }

    play(tmp_path, scene)


def test_names_of_secrets_are_for_those_who_may_read_secrets(tmp_path: Path) -> None:
    async def stranger(place: Place) -> None:
        assert (await place.ask("GET", "/v1/state/secrets")).status == 403
        assert (await place.ask("GET", "/v1/state")).json["secret_keys"] == []

    async def reader(place: Place) -> None:
        names = [{"key": "api-key", "version": 1}, {"key": "db-pass", "version": 2}]
        assert (await place.ask("GET", "/v1/state/secrets")).json == names
        assert (await place.ask("GET", "/v1/state")).json["secret_keys"] == names

    play(tmp_path, stranger)
    play(tmp_path, reader, DESIRED, Right.READ, Right.SECRET)


def test_empty_state_is_empty_collections(tmp_path: Path) -> None:
    async def scene(place: Place) -> None:
        for path, empty in (("metadata", "{}"), ("data", "[]"), ("secrets", "[]"), ("report", "[]")):
            assert (await place.ask("GET", f"/v1/state/{path}")).text == empty

    play(tmp_path, scene, Desired(), Right.READ, Right.SECRET)


def test_single_keys_are_decoded_once(tmp_path: Path) -> None:
    async def scene(place: Place) -> None:
        assert (await place.ask("GET", "/v1/state/metadata/region")).json == {"key": "region", "value": "eu-1"}
        assert (await place.ask("GET", "/v1/state/metadata/a%2Fb")).json["value"] == "slash"
        for missing in ("a%252Fb", "a/b", "", "nobody", "%FF", "..%2Fregion"):
            assert (await place.ask("GET", f"/v1/state/metadata/{missing}")).code == "not_found"

    play(tmp_path, scene)


def test_key_may_look_like_the_place_of_one(tmp_path: Path) -> None:
    async def scene(place: Place) -> None:
        asked = await place.ask("GET", "/v1/state/metadata/%7Bkey%7D")
        assert asked.json == {"key": "{key}", "value": "braces"}

    play(tmp_path, scene, Desired(metadata={"{key}": "braces"}), Right.READ)


def test_data_entry_keeps_every_digit_and_is_known_by_its_version(tmp_path: Path) -> None:
    async def scene(place: Place) -> None:
        answer = await place.ask("GET", "/v1/state/data/proxy")
        assert (answer.status, answer.headers["ETag"]) == (200, '"4"')
        assert '"payload": {"retries":3,"ratio":0.10}' in answer.text
        assert {**answer.json, "payload": None} == {
            "key": "proxy",
            "content_type": "application/json",
            "payload": None,
            "version": 4,
            "updated_at": "2026-03-02T08:15:30Z",
        }
        assert "9" * 5000 in (await place.ask("GET", "/v1/state/data/big")).text
        for tag, status in (('"4"', 304), ("*", 304), ('W/"4"', 304), ('"3", "4"', 304), ('"3"', 200), ("4", 200)):
            known = await place.ask("GET", "/v1/state/data/proxy", headers=[("if-none-match", tag)])
            assert (known.status, known.headers["ETag"]) == (status, '"4"')
        assert (await place.ask("GET", "/v1/state/data/none")).code == "not_found"

    play(tmp_path, scene)


@pytest.mark.parametrize(
    "query",
    ["since=x", "since=-1", "since=" + "9" * 30, "since=1&wait=61s", "since=1&wait=soon", "wait=-1s", "a&" * 30],
)
def test_what_is_no_revision_or_wait_is_refused(tmp_path: Path, query: str) -> None:
    async def scene(place: Place) -> None:
        answer = await place.ask("GET", f"/v1/state?{query}")
        assert (answer.status, answer.code) == (400, "invalid_parameter")

    play(tmp_path, scene)


def test_without_since_nobody_waits(tmp_path: Path) -> None:
    async def scene(place: Place) -> None:
        before = asyncio.get_running_loop().time()
        assert (await place.ask("GET", "/v1/state?wait=60s")).json["revision"] == 1
        assert (await place.ask("GET", "/v1/state?since=0&wait=60s")).status == 200
        assert (await place.ask("GET", "/v1/state?since=1")).status == 304
        assert asyncio.get_running_loop().time() == before

    play(tmp_path, scene, run=run_virtual)


def test_waiting_ends_with_the_next_change_or_its_time(tmp_path: Path) -> None:
    async def scene(place: Place) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        assert (await place.ask("GET", "/v1/state?since=1&wait=1m")).status == 304
        assert loop.time() - started == 60

        waiting = asyncio.create_task(place.ask("GET", "/v1/state?since=1&wait=1m"))
        await asyncio.sleep(10)
        place.desired = replace(DESIRED, metadata={"region": "us-1"})
        place.revision.move()
        answer = await waiting
        assert loop.time() - started == 70
        assert (answer.json["revision"], answer.json["metadata"]) == (2, {"region": "us-1"})

    play(tmp_path, scene, run=run_virtual)


def test_waiting_takes_no_more_than_half_of_the_connections(tmp_path: Path) -> None:
    async def scene(place: Place) -> None:
        waiting = [asyncio.create_task(place.ask("GET", "/v1/state?since=1&wait=1m")) for _ in range(MAX_WAITING)]
        await asyncio.sleep(1)
        answer = await place.ask("GET", "/v1/state?since=1&wait=1m")
        assert (answer.status, answer.code, answer.headers["Retry-After"]) == (503, "too_many_waiting", "1")
        assert (await place.ask("GET", "/v1/state")).status == 200
        place.revision.move()
        assert {(await each).status for each in waiting} == {200}
        assert (await place.ask("GET", "/v1/state?since=2&wait=1m")).status == 304

    play(tmp_path, scene, run=run_virtual)


def test_stop_ends_the_waiting_and_refuses_writes(tmp_path: Path) -> None:
    async def scene(place: Place) -> None:
        waiting = asyncio.create_task(place.ask("GET", "/v1/state?since=1&wait=1m"))
        await asyncio.sleep(1)
        place.revision.stop()
        assert (await waiting).status == 304
        assert asyncio.get_running_loop().time() < 2
        for method in ("PUT", "DELETE"):
            answer = await place.ask(method, "/v1/state/report/a", {"content_type": "a/b", "payload": 1})
            assert (answer.status, answer.code) == (503, "shutting_down")
        assert (await place.ask("GET", "/v1/state")).status == 200

    play(tmp_path, scene, run=run_virtual)
