"""Writing reports through the node API: what is accepted, versions, preconditions, and what is on disk afterwards."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from plexd.node.reports import MAX_ENTRIES, REMEMBERED_DELETES, Reports
from plexd.store.files import DataDirectory
from plexd.store.reports import Operation, ReportStore
from tests.api.asking import Place, play
from tests.store.crash import crashes

REPORT = "/v1/state/report/backup-state"
GOOD: dict[str, Any] = {"content_type": "application/json", "payload": {"ok": True}}
DEEP = b"[" * 600 + b"]" * 600


def test_report_is_stored_before_the_answer(tmp_path: Path) -> None:
    async def scene(place: Place) -> None:
        answer = await place.ask("PUT", REPORT, {**GOOD, "unknown": 1})
        assert (answer.status, answer.headers["ETag"]) == (200, '"1"')
        stored = {"key": "backup-state", **GOOD, "version": 1, "updated_at": "2027-01-15T08:00:00Z"}
        assert answer.json == stored
        state = tmp_path / "data" / "state"
        assert json.loads((state / "report" / "backup-state.json").read_text()) == stored
        sync = json.loads((state / "report_sync.json").read_text())
        assert sync["pending"] == {"backup-state": {"op": "put", "version": 1}}
        assert (sync["high_water"], sync["parked"]) == ({"backup-state": 1}, {})
        assert (state / "report_sync.json").stat().st_mode & 0o777 == 0o600
        assert (state / "report").stat().st_mode & 0o777 == 0o700

        assert (await place.ask("GET", REPORT)).json == {**stored, "sync": "pending"}
        await place.reports.sent({"backup-state": Operation("put", 1)})
        listed = await place.ask("GET", "/v1/state/report")
        assert [(entry["key"], entry["sync"]) for entry in listed.json] == [("backup-state", "synced")]
        assert (await place.ask("GET", REPORT, headers=[("if-none-match", '"1"')])).status == 304

    play(tmp_path, scene)


@pytest.mark.parametrize(
    "payload",
    ["null", "1.0", "1e400", "-0", "0.10", "9" * 5000, '{"b":1,"a":2}', '"}"', '"\\ud83d\\ude00"', "[[]]", '"ключ"'],
)
def test_payload_comes_back_with_every_digit(tmp_path: Path, payload: str) -> None:
    async def write(place: Place) -> None:
        body = f'{{"payload":{payload},"content_type":"application/json"}}'.encode()
        assert (await place.ask("PUT", REPORT, body)).status == 200

    async def read(place: Place) -> None:
        text = (await place.ask("GET", REPORT)).text
        spelled = payload if "\\u" not in payload else '"😀"'
        assert f'"payload": {spelled}, "version": 1' in text

    play(tmp_path, write)
    play(tmp_path, read)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"), (b"x", "invalid_json"), (b"[]", "invalid_json"), (b"null", "invalid_json"),
        (b'{"content_type":"a/b","payload":"\xff"}', "invalid_json"), (b'{"payload":NaN}', "invalid_json"),
        (b'{"content_type":"a/b","payload":' + DEEP + b"}", "invalid_json"), (b"[" * 100_000, "invalid_json"),
        (b'{"payload":1}', "content_type_required"), (b'{"content_type":"","payload":1}', "content_type_required"),
        (b'{"content_type":null,"payload":1}', "content_type_required"),
        (b'{"content_type":7,"payload":1}', "content_type_required"),
        (b'{"content_type":"text","payload":1}', "content_type_required"),
        (b'{"content_type":"text/","payload":1}', "content_type_required"),
        (b'{"content_type":"a/b\\n","payload":1}', "content_type_required"),
        (b'{"content_type":"a/b; c","payload":1}', "content_type_required"),
        (b'{"content_type":"a/' + b"b" * 126 + b'","payload":1}', "content_type_required"),
        (b'{"content_type":"a/b"}', "payload_required"),
    ],
    ids=lambda value: value[:40].decode("latin-1") if isinstance(value, bytes) else value,
)  # fmt: skip
def test_bad_body_is_refused_and_changes_nothing(tmp_path: Path, body: bytes, code: str) -> None:
    async def scene(place: Place) -> None:
        answer = await place.ask("PUT", REPORT, body)
        assert (answer.status, answer.code) == (400, code)
        assert (await place.ask("GET", "/v1/state/report")).json == []
        assert place.revision.number == 1

    play(tmp_path, scene)


@pytest.mark.parametrize("content_type", ["a/b", "text/plain; charset=utf-8", 'a/b;c="d e";f=g', "a/" + "b" * 125])
def test_content_type_may_have_parameters(tmp_path: Path, content_type: str) -> None:
    async def scene(place: Place) -> None:
        answer = await place.ask("PUT", REPORT, {"content_type": content_type, "payload": 1})
        assert (answer.status, answer.json["content_type"]) == (200, content_type)

    play(tmp_path, scene)


@pytest.mark.parametrize("key", ["", ".x", "-", "a%2Fb", "..%2Fx", "a%20b", "%C3%A9", "%FF", "x" * 129, "a%0A", "%00"])
def test_illegal_key_is_refused_by_every_method(tmp_path: Path, key: str) -> None:
    async def scene(place: Place) -> None:
        for method in ("GET", "PUT", "DELETE"):
            answer = await place.ask(method, f"/v1/state/report/{key}", GOOD)
            assert (answer.status, answer.code) == (400, "invalid_key")

    play(tmp_path, scene)


def test_keys_of_plexd_itself_can_be_read_only(tmp_path: Path) -> None:
    async def scene(place: Place) -> None:
        await place.reports.put("plexd.self", "a/b", "1", lambda _: True)
        for method in ("PUT", "DELETE"):
            answer = await place.ask(method, "/v1/state/report/plexd.self", GOOD)
            assert (answer.status, answer.code) == (403, "reserved_key")
        assert (await place.ask("GET", "/v1/state/report/plexd.self")).json["version"] == 1
        assert (await place.ask("PUT", "/v1/state/report/plexd", GOOD)).status == 200

    play(tmp_path, scene)


ABSENT, PRESENT = 0, 3
MATCHES = [
    ("if-match", "3", PRESENT, True), ("if-match", '"3"', PRESENT, True), ("if-match", "2", PRESENT, False),
    ("if-match", '"4"', PRESENT, False), ("if-match", "*", PRESENT, True), ("if-match", "*", ABSENT, False),
    ("if-match", "0", ABSENT, True), ("if-match", '"0"', ABSENT, True), ("if-match", "0", PRESENT, False),
    ("if-match", "3", ABSENT, False), ("if-none-match", "*", ABSENT, True), ("if-none-match", "*", PRESENT, False),
]  # fmt: skip


@pytest.mark.parametrize(("header", "value", "current", "holds"), MATCHES)
@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_precondition(tmp_path: Path, method: str, header: str, value: str, current: int, holds: bool) -> None:
    async def scene(place: Place) -> None:
        for _ in range(current):
            await place.ask("PUT", REPORT, GOOD)
        answer = await place.ask(method, REPORT, GOOD, headers=[(header, value)])
        if holds and method == "PUT":
            assert (answer.status, answer.json["version"]) == (200, current + 1)
        elif holds:
            assert answer.status == (204 if current else 404)
        else:
            assert (answer.status, answer.code) == (409, "version_conflict")
            assert answer.json["current_version"] == current

    play(tmp_path, scene)


@pytest.mark.parametrize(
    "headers",
    [
        [("if-match", "")], [("if-match", "x")], [("if-match", "+3")], [("if-match", "-1")], [("if-match", "1, 2")],
        [("if-match", 'W/"3"')], [("if-match", '"3')], [("if-match", "3.0")], [("if-match", "9" * 5000)],
        [("if-match", "٣")], [("if-match", "3"), ("if-match", "3")], [("if-none-match", "3")],
        [("if-none-match", '"3"')], [("if-none-match", "")], [("if-none-match", "*"), ("if-none-match", "*")],
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_what_is_no_precondition_is_refused(tmp_path: Path, method: str, headers: list[tuple[str, str]]) -> None:
    async def scene(place: Place) -> None:
        await place.ask("PUT", REPORT, GOOD)
        answer = await place.ask(method, REPORT, GOOD, headers=headers)
        assert (answer.status, answer.code) == (400, "invalid_precondition")
        assert (await place.ask("GET", REPORT)).json["version"] == 1

    play(tmp_path, scene)


def test_versions_never_go_back_not_even_over_a_restart(tmp_path: Path) -> None:
    async def first(place: Place) -> None:
        for version in (1, 2):
            assert (await place.ask("PUT", REPORT, GOOD)).json["version"] == version  # equal content counts as well
        assert (await place.ask("DELETE", REPORT)).status == 204
        assert (await place.ask("DELETE", REPORT)).status == 404
        assert (await place.ask("GET", REPORT)).status == 404
        assert (await place.ask("PUT", REPORT, GOOD)).json["version"] == 3
        await place.ask("DELETE", REPORT)
        await place.reports.sent(place.reports.pending)

    async def second(place: Place) -> None:
        assert (await place.ask("PUT", REPORT, GOOD)).json["version"] == 4

    play(tmp_path, first)
    play(tmp_path, second)


def test_of_writers_with_one_version_in_mind_one_wins(tmp_path: Path) -> None:
    async def scene(place: Place) -> None:
        await place.ask("PUT", REPORT, GOOD)
        answers = await asyncio.gather(
            *(place.ask("PUT", REPORT, GOOD, headers=[("if-match", "1")]) for _ in range(20)),
            place.ask("DELETE", REPORT, headers=[("if-match", "1")]),
        )
        assert sorted(answer.status for answer in answers) == [200] + [409] * 20

    play(tmp_path, scene)


def test_one_report_too_many_is_refused_and_those_there_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(place: Place) -> None:
        for number in range(MAX_ENTRIES):
            assert (await place.ask("PUT", f"/v1/state/report/k{number}", GOOD)).status == 200
        answer = await place.ask("PUT", "/v1/state/report/more", GOOD)
        assert (answer.status, answer.code) == (507, "report_limit")
        assert (await place.ask("PUT", "/v1/state/report/k1", GOOD)).json["version"] == 2
        await place.ask("DELETE", "/v1/state/report/k1")
        assert (await place.ask("PUT", "/v1/state/report/more", GOOD)).status == 200

    monkeypatch.setattr(os, "fsync", lambda _: None)  # a thousand of them take a while
    play(tmp_path, scene)


def test_disk_that_refuses_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(place: Place) -> None:
        await place.ask("PUT", REPORT, GOOD)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", full)
            for method in ("PUT", "DELETE"):
                answer = await place.ask(method, REPORT, GOOD)
                assert (answer.status, answer.code) == (500, "storage_error")
                assert "space" not in answer.text
        assert (await place.ask("GET", REPORT)).json["version"] == 1
        assert place.revision.number == 2
        assert (await place.ask("PUT", REPORT, GOOD)).json["version"] == 2

    play(tmp_path, scene)


def test_writer_that_leaves_half_way_has_written(tmp_path: Path) -> None:
    async def scene(place: Place) -> None:
        writing = asyncio.create_task(place.ask("PUT", REPORT, GOOD))
        for _ in range(3):
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait([writing])
        await place.reports.sent({})  # has its turn after the write
        assert (await place.ask("GET", REPORT)).json["version"] == 1

    play(tmp_path, scene)


# what a crash and a damaged disk leave


def load(path: Path) -> tuple[dict[str, tuple[int, str]], dict[str, Operation], int]:
    """Entries as version and payload, what is pending, and the version the next write would get."""
    directory = DataDirectory(path)
    try:
        entries, delivery = ReportStore(directory).load()
    finally:
        directory.close()
    assert set(delivery.pending) >= set(entries), "nothing was ever sent"
    assert all(delivery.high_water[key] >= entry.version for key, entry in entries.items())
    return (
        {key: (entry.version, entry.payload) for key, entry in entries.items()},
        dict(delivery.pending),
        delivery.next_version("k"),
    )


def write(path: Path, *payloads: str | None) -> None:
    """Each in turn; None deletes."""

    async def main() -> None:
        directory = DataDirectory(path)
        reports = Reports(ReportStore(directory))
        for payload in payloads:
            if payload is None:
                await reports.delete("k", lambda _: True)
            else:
                await reports.put("k", "a/b", payload, lambda _: True)
        directory.close()

    asyncio.run(main())


def test_killed_write_leaves_the_old_or_the_new_and_never_forgets_to_send(tmp_path: Path) -> None:
    seen = set()
    for n in crashes(lambda n: write(tmp_path / str(n), '"new"'), lambda n: write(tmp_path / str(n), '"old"')):
        entries, pending, following = load(tmp_path / str(n))
        assert entries["k"] in {(1, '"old"'), (2, '"new"')}
        assert pending == {"k": Operation("put", entries["k"][0])}
        assert following == entries["k"][0] + 1
        seen.add(entries["k"])
        assert load(tmp_path / str(n)) == (entries, pending, following)
    assert len(seen) == 2


def test_killed_delete_leaves_the_entry_or_a_delete_to_send(tmp_path: Path) -> None:
    seen = set()
    for n in crashes(lambda n: write(tmp_path / str(n), None), lambda n: write(tmp_path / str(n), "1", "2")):
        entries, pending, following = load(tmp_path / str(n))
        assert (entries, pending) in [
            ({"k": (2, "2")}, {"k": Operation("put", 2)}),
            ({}, {"k": Operation("delete", 2)}),
        ]
        assert following == 3
        seen.add(bool(entries))
    assert seen == {True, False}


def test_killed_first_write_and_write_after_delete(tmp_path: Path) -> None:
    for n in crashes(lambda n: write(tmp_path / str(n), "1"), lambda n: (tmp_path / str(n)).mkdir()):
        entries, pending, _ = load(tmp_path / str(n))
        assert (entries, pending) in [({}, {}), ({"k": (1, "1")}, {"k": Operation("put", 1)})]
    for n in crashes(lambda n: write(tmp_path / f"b{n}", "3"), lambda n: write(tmp_path / f"b{n}", "1", None)):
        entries, pending, following = load(tmp_path / f"b{n}")
        assert (entries, pending, following) in [
            ({}, {"k": Operation("delete", 1)}, 2),
            ({"k": (2, "3")}, {"k": Operation("put", 2)}, 3),
        ]


def deliver(path: Path, step: str) -> None:
    """What the control plane's answer does to the one report that is due."""

    async def main() -> None:
        directory = DataDirectory(path)
        reports = Reports(ReportStore(directory))
        (operation,) = reports.pending.values()
        if step == "sent":
            await reports.sent({"k": operation})
        elif step == "parked":
            await reports.park("k", operation)
        else:
            await reports.raise_version("k", operation, 42)
        directory.close()

    asyncio.run(main())


@pytest.mark.parametrize(("step", "done"), [("sent", {}), ("parked", {}), ("raised", {"k": Operation("put", 42)})])
def test_killed_bookkeeping_of_a_delivery_forgets_nothing(
    tmp_path: Path, step: str, done: dict[str, Operation]
) -> None:
    seen = []
    for n in crashes(lambda n: deliver(tmp_path / str(n), step), lambda n: write(tmp_path / str(n), "1")):
        directory = DataDirectory(tmp_path / str(n))
        entries, delivery = ReportStore(directory).load()
        directory.close()
        assert delivery.pending in [{"k": Operation("put", 1)}, done]
        assert entries["k"].version == (42 if delivery.pending == {"k": Operation("put", 42)} else 1)
        assert delivery.next_version("k") == entries["k"].version + 1
        seen.append(delivery.pending)
    assert {"k": Operation("put", 1)} in seen
    assert done in seen


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"pending":{"k":1}}', b"\xff", b"[" * 100_000])
def test_lost_bookkeeping_sends_everything_again(tmp_path: Path, damage: bytes) -> None:
    write(tmp_path, "1", "2")
    (tmp_path / "state" / "report_sync.json").write_bytes(damage)
    assert load(tmp_path) == ({"k": (2, "2")}, {"k": Operation("put", 2)}, 3)
    (kept,) = (tmp_path / "state").glob("report_sync.json.corrupt-*")
    assert kept.read_bytes() == damage


def test_damaged_entry_is_moved_aside_and_nothing_else_suffers(tmp_path: Path) -> None:
    write(tmp_path, "1")
    (tmp_path / "state" / "report" / "other.json").write_text("{")
    (tmp_path / "state" / "report" / "k.json").write_text("")
    assert load(tmp_path) == ({}, {}, 2)
    assert len(list((tmp_path / "state" / "report").glob("*.corrupt-*"))) == 2


async def test_programs_that_make_up_keys_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plexd.node.reports.REMEMBERED_DELETES", 20)
    assert REMEMBERED_DELETES == 4096
    reports = Reports(ReportStore(DataDirectory(tmp_path)))
    for number in range(50):
        for _ in range(3):
            await reports.put(f"k{number}", "a/b", "1", lambda _: True)
        await reports.delete(f"k{number}", lambda _: True)
        await reports.sent(dict(reports.pending))
    document = json.loads((tmp_path / "state" / "report_sync.json").read_text())
    assert len(document["high_water"]) <= 21
    assert (await reports.put("k0", "a/b", "1", lambda _: True)).version > 3
