"""What a record looks like on stderr, and what never gets there."""

import asyncio
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from plexd import log
from plexd.log import PRIORITIES, Sink, detect_format, get_logger, set_up
from plexd.masking import register_secret
from plexd.mesh.address import Endpoint
from plexd.mesh.keys import PresharedKey, PrivateKey


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


pytestmark = pytest.mark.usefixtures("own_logging")


def start(log_format: str, level: str = "debug", clock: Clock | None = None) -> io.StringIO:
    stream = io.StringIO()
    set_up(level, log_format, environ={}, stream=stream, monotonic=clock or Clock())
    return stream


# formats


def test_console_line_for_people() -> None:
    stream = start("console")
    get_logger("mesh").info("peer added", peer="n_9c20", endpoint="198.51.100.23:51820")
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.\d{3} INFO  mesh  peer added  peer=n_9c20 endpoint=198.51.100.23:51820\n", stream.getvalue()
    )


def test_json_line_for_programs() -> None:
    stream = start("json")
    get_logger("mesh").warning("left out of the mesh", peer="n_9c20", count=2, seconds=1.5, last=None, ok=True)
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", record["time"])
    assert list(record.items())[1:] == [
        ("level", "warn"),
        ("component", "mesh"),
        ("message", "left out of the mesh"),
        ("peer", "n_9c20"),
        ("count", 2),
        ("seconds", 1.5),
        ("last", None),
        ("ok", True),
    ]


def test_journal_line_has_priority_and_no_time() -> None:
    stream = start("journal")
    logger = get_logger("mesh")
    for write in (logger.debug, logger.info, logger.warning, logger.error, logger.critical):
        write("peer added", peer="n_1")
    assert stream.getvalue().splitlines() == [f"<{n}>mesh: peer added peer=n_1" for n in (7, 6, 4, 3, 2)]
    assert PRIORITIES == {"debug": 7, "info": 6, "warn": 4, "error": 3, "fatal": 2}


def test_traceback_stands_below_on_the_console_and_inside_elsewhere() -> None:
    for log_format in ("console", "json", "journal"):
        stream = start(log_format)
        try:
            raise RuntimeError("first\nsecond")
        except RuntimeError:
            get_logger("supervisor").exception("service failed", service="heartbeat")
        lines = stream.getvalue().splitlines()
        if log_format == "console":
            assert lines[0].endswith("ERROR supervisor  service failed  service=heartbeat")
            assert lines[1] == "Traceback (most recent call last):"
            assert lines[-1] == "second"
        else:
            assert len(lines) == 1
            assert "Traceback (most recent call last)" in lines[0]
    record = json.loads(start_json_with_exception())
    assert record["exception"].endswith("ValueError: no")


def start_json_with_exception() -> str:
    stream = start("json")
    try:
        raise ValueError("no")
    except ValueError as exc:
        get_logger("x").error("it failed", exc_info=exc)
    return stream.getvalue()


@pytest.mark.parametrize("log_format", ["console", "json", "journal"])
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    key=st.text(st.characters(categories=["L", "Zs", "Cc"]), min_size=1, max_size=5),
)
def test_one_record_is_one_line(log_format: str, text: str, key: str) -> None:
    """Whatever a peer or the control plane calls things, it can't start a record of its own."""
    stream = start(log_format)
    get_logger(f"mesh{text}").info(f"peer added{text}", **{"peer": text, f"x{key}": [text, {key: text}]})
    assert len(stream.getvalue().splitlines()) == 1
    assert stream.getvalue().removesuffix("\n").isprintable() or log_format == "json"


def test_values_with_spaces_are_quoted() -> None:
    stream = start("journal")
    get_logger("x").info("m", a="b c", d="", e='"', f="g=h", i=[1, "j k"], umlaut="\xfc", bell="\x07")
    assert stream.getvalue() == ('<6>x: m a="b c" d="" e="\\"" f="g=h" i=[1, "j k"] umlaut=\xfc bell="\\u0007"\n')


def test_key_named_like_a_column_does_not_replace_it() -> None:
    stream = start("json")
    get_logger("x").info("m", time="later", message="other")
    record = json.loads(stream.getvalue())
    assert (record["message"], record["message_"], record["time_"]) == ("m", "other", "later")


def test_strange_numbers_are_still_json() -> None:
    stream = start("json")
    get_logger("x").info("m", a=float("nan"), b=float("inf"), c=ip_address("192.0.2.1"), d=Endpoint(b"\x01\2\3\4", 5))
    record = json.loads(stream.getvalue(), parse_constant=pytest.fail)
    assert [record[key] for key in "abcd"] == ["nan", "inf", "192.0.2.1", "1.2.3.4:5"]


@pytest.mark.parametrize(("level", "said"), [("debug", 4), ("info", 3), ("warn", 2), ("error", 1)])
def test_level_filters(level: str, said: int) -> None:
    stream = start("json", level)
    logger = get_logger("x")
    for write in (logger.debug, logger.info, logger.warning, logger.error):
        write("m")
    assert len(stream.getvalue().splitlines()) == said


def test_setting_up_again_reaches_loggers_made_before() -> None:
    logger = get_logger("x")
    first = start("json", "error")
    logger.info("m")
    second = start("json", "info")
    logger.info("m")
    assert (first.getvalue(), len(second.getvalue().splitlines())) == ("", 1)


# auto


def test_auto_is_journal_when_the_stream_is_the_journals(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("w") as stream:
        status = os.fstat(stream.fileno())
        assert detect_format(stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}) == "journal"
        assert detect_format(stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"}) == "json"
        assert detect_format(stream, {"JOURNAL_STREAM": ""}) == "json"
        assert detect_format(stream, {}) == "json"


def test_auto_is_console_on_a_terminal_and_coloured_unless_refused() -> None:
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        assert detect_format(terminal, {}) == "console"
        for environ, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
            set_up("info", "auto", environ=environ, stream=terminal)
            get_logger("mesh").info("peer added")
            assert (b"\033[32mINFO \033[0m mesh" in os.read(leader, 4096)) is coloured
    os.close(leader)


def test_auto_is_json_without_a_file() -> None:
    assert detect_format(io.StringIO(), {}) == "json"


# secrets


@dataclass(frozen=True)
class Holder:
    key: PrivateKey


@pytest.mark.parametrize("log_format", ["console", "json", "journal"])
def test_secret_types_never_print(log_format: str) -> None:
    key, psk = PrivateKey.generate(), PresharedKey(os.urandom(32))
    stream = start(log_format)
    raw = bytes(key)
    get_logger("x").info(
        "m", a=key, b=psk, c=SecretStr("hush"), d=[key], e={"k": psk}, f=raw, g=bytearray(raw), h=Holder(key), i={key}
    )
    text = stream.getvalue()
    assert "32 bytes" in text
    for secret in (key.reveal(), psk.reveal(), "hush", raw.hex(), repr(raw)[2:-1], json.dumps(repr(raw))[3:-2]):
        assert secret not in text


AWKWARD = "hu\"sh\\ hu'sh/+="


@pytest.mark.parametrize("log_format", ["console", "json", "journal"])
def test_registered_secret_is_masked_wherever_it_turns_up(log_format: str) -> None:
    stream = start(log_format)
    register_secret(AWKWARD)
    try:
        raise RuntimeError(f"refused {AWKWARD!r}")
    except RuntimeError:
        get_logger("x").exception(
            f"m {AWKWARD}", a=AWKWARD, b=f"Bearer {AWKWARD}", c=[{AWKWARD: repr(AWKWARD)}], d=json.dumps(AWKWARD)
        )
    text = stream.getvalue()
    assert text.count("[redacted]") == 7
    assert "hu" not in text.replace("[redacted]", "")


def test_longer_secret_is_masked_whole_when_it_contains_a_shorter_one() -> None:
    stream = start("json")
    register_secret("abcd")
    register_secret("abcdefgh")
    get_logger("x").info("m", a="abcdefgh")
    assert json.loads(stream.getvalue())["a"] == "[redacted]"


def test_very_short_text_is_not_taken_for_a_secret() -> None:
    stream = start("json")
    register_secret("e")
    register_secret("")
    get_logger("x").info("peer added")
    assert "peer added" in stream.getvalue()


# repeated warnings


def test_identical_warnings_are_said_once_a_minute_and_counted() -> None:
    clock = Clock()
    stream = start("journal", clock=clock)
    logger = get_logger("heartbeat")
    for _ in range(5):
        logger.warning("heartbeat failed", error="refused")
        logger.warning("heartbeat failed", error="timeout")
        clock.now += 10
    clock.now += 10
    logger.warning("heartbeat failed", error="refused")
    clock.now += 60
    logger.warning("heartbeat failed", error="refused")
    assert stream.getvalue().splitlines() == [
        "<4>heartbeat: heartbeat failed error=refused",
        "<4>heartbeat: heartbeat failed error=timeout",
        "<4>heartbeat: heartbeat failed error=refused suppressed=4",
        "<4>heartbeat: heartbeat failed error=refused",
    ]


def test_only_warnings_are_held_back() -> None:
    stream = start("journal")
    for _ in range(3):
        get_logger("x").error("failed")
        get_logger("x").info("done")
    assert len(stream.getvalue().splitlines()) == 6


def test_memory_of_warnings_is_bounded() -> None:
    start("journal")
    limit = log.RateLimit(Clock())
    for number in range(3 * log.REMEMBERED_WARNINGS):
        limit(None, "warning", {"level": "warn", "event": "m", "number": number})
    assert len(limit._said) == log.REMEMBERED_WARNINGS


# the way out


def test_reader_that_went_away_is_survived() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        sink = Sink(stream)
        sink.msg("nobody hears this")
        with pytest.raises(BrokenPipeError):  # what is still in the buffer
            stream.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sink.msg("closed")


def test_library_messages_come_as_records() -> None:
    stream = start("json")
    register_secret("hush-4711")
    logging.getLogger("asyncio").error("task died of %s", "hush-4711")
    logging.getLogger("httpx").info("not interesting")
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record["component"] == "python"
    assert (record["level"], record["logger"], record["text"]) == ("error", "asyncio", "task died of [redacted]")


async def test_forgotten_task_is_logged_as_a_record() -> None:
    stream = start("json")

    async def fail() -> None:
        raise RuntimeError("forgotten")

    task = asyncio.get_running_loop().create_task(fail())
    await asyncio.wait([task])
    del task
    assert json.loads(stream.getvalue().splitlines()[0])["logger"] == "asyncio"


@pytest.mark.parametrize("module", ["plexd.runtime.slim_imports"])
def test_programs_for_terminals_stay_out_of_the_daemon(module: str) -> None:
    program = (
        f"import {module}, structlog, httpx, sys\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'rich', 'click', 'pygments', 'typer'}))\n"
        "import click, rich; print('importable afterwards')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\nimportable afterwards\n"


def test_listener_hears_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, str, str]] = []
    monkeypatch.setattr(log, "_listeners", [lambda *record: heard.append(record)])
    set_up("info", "json", stream=io.StringIO())
    get_logger("mesh").info("peer added", peer="n_1", text="two words")
    get_logger("mesh").debug("not written")
    assert heard == [("info", "mesh", 'mesh: peer added peer=n_1 text="two words"')]
