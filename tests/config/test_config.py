"""Where a value comes from, and what is said about values that cannot be used."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plexd.config.document import edit_distance, read_document
from plexd.config.keys import KEYS
from plexd.config.layers import VARIABLES
from plexd.config.load import Loaded, load
from plexd.config.models import Config, effective_hostname
from plexd.config.show import as_yaml, redacted
from plexd.errors import ConfigError

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        path.chmod(0o640)
        return path

    return write


def load_file(path: Path, environ: Mapping[str, str] | None = None, command: str = "", **flags: str) -> Loaded:
    return load({"config": str(path), **flags}, environ or {}, command=command)


def problems(path: Path, environ: Mapping[str, str] | None = None, command: str = "", **flags: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_file(path, environ, command, **flags)
    return [problem.replace(str(path), "FILE") for problem in caught.value.problems]


def value(config: Config, key: str) -> object:
    found: object = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


# precedence


def test_each_level_covers_the_one_below(write: Write) -> None:
    path = write("heartbeat: {interval: 1m}\nlog_level: debug\n")
    empty = write("").with_name("empty.yaml")
    empty.write_text("")
    generic, named = {"PLEXD__LOG_LEVEL": "error"}, {"PLEXD_LOG_LEVEL": "warn"}

    def level(file: Path, environ: Mapping[str, str], **flags: str) -> tuple[str, str]:
        path.write_text("heartbeat: {interval: 1m}\nlog_level: debug\n")
        loaded = load_file(file, environ, **flags)
        return loaded.config.log_level, loaded.origins["log_level"]

    assert level(empty, {}) == ("info", "default")
    assert level(path, {}) == ("debug", f"{path}:2")
    assert level(path, generic) == ("error", "PLEXD__LOG_LEVEL")
    assert level(path, generic | named) == ("warn", "PLEXD_LOG_LEVEL")
    assert level(path, generic | named, log_level="info") == ("info", "--log-level")


@pytest.mark.parametrize(
    ("variable", "text", "key", "expected"),
    [
        ("PLEXD_API", "https://cp.example.net/", "api", "https://cp.example.net"),
        ("PLEXD_MODE", "node", "mode", "node"),
        ("PLEXD_LOG_LEVEL", "warning", "log_level", "warn"),
        ("PLEXD_LOG_FORMAT", "json", "log_format", "json"),
        ("PLEXD_DATA_DIR", "/srv/plexd/", "data_dir", Path("/srv/plexd")),
        ("PLEXD_HOSTNAME", " on ", "hostname", "on"),
        ("PLEXD_BOOTSTRAP_TOKEN_FILE", "/run/token", "token.file", Path("/run/token")),
        ("PLEXD_NODE_API_ENABLED", "off", "node_api.enabled", False),
        ("PLEXD_NODE_API_SOCKET", "/run/p.sock", "node_api.socket", Path("/run/p.sock")),
        ("PLEXD__MESH__LISTEN_PORT", "51821", "mesh.listen_port", 51821),
        ("PLEXD__MESH__KEEP_ON_STOP", "OFF", "mesh.keep_on_stop", False),
        ("PLEXD__HEARTBEAT__INTERVAL", "1m30s", "heartbeat.interval", timedelta(seconds=90)),
        ("PLEXD__REGISTRATION__METADATA", '{"rack": "12"}', "registration.metadata", {"rack": "12"}),
        ("PLEXD__TOKEN__ENV", "MESH_TOKEN", "token.env", "MESH_TOKEN"),
        ("PLEXD__NAT_TRAVERSAL__STUN_SERVERS", "192.0.2.1:3478, [2001:db8::1]:3478,stun.example.net:3478",
         "nat_traversal.stun_servers", ("192.0.2.1:3478", "[2001:db8::1]:3478", "stun.example.net:3478")),
        ("PLEXD__NAT_TRAVERSAL__PUBLIC_ENDPOINT", "[2001:db8::7]:51820", "nat_traversal.public_endpoint",
         "[2001:db8::7]:51820"),
    ],
)  # fmt: skip
def test_variable_sets_its_key(write: Write, variable: str, text: str, key: str, expected: object) -> None:
    loaded = load_file(write(""), {variable: text})
    assert value(loaded.config, key) == expected
    assert loaded.origins[key] == variable
    assert not loaded.warnings


def test_every_key_can_be_set_by_its_generic_variable(write: Write) -> None:
    """The name of a key is never ambiguous: no underscore of a name is taken for a level."""
    for key in KEYS:
        name = "PLEXD__" + key.upper().replace(".", "__")
        try:
            origins = load_file(write(""), {name: "1"}).origins
        except ConfigError as exc:
            assert "unknown" not in str(exc)  # noqa: PT017 - some keys do not take this value
        else:
            assert origins[key] == name


def test_empty_variable_counts_as_unset(write: Write) -> None:
    names = [*VARIABLES, "PLEXD_CONFIG", "PLEXD__MESH__MTU", "PLEXD__NO__SUCH__KEY"]
    loaded = load_file(write("log_level: debug"), dict.fromkeys(names, ""))
    assert loaded.config.log_level == "debug"
    assert set(loaded.origins.values()) == {"default", f"{loaded.path}:1"}


@pytest.mark.parametrize("text", ["true", "TRUE", "1", "yes", "On"])
def test_words_for_true(write: Write, text: str) -> None:
    assert load_file(write(""), {"PLEXD__TLS__INSECURE_SKIP_VERIFY": text}).config.tls.insecure_skip_verify is True


@pytest.mark.parametrize("text", ["false", "0", "NO", "off"])
def test_words_for_false(write: Write, text: str) -> None:
    assert load_file(write(""), {"PLEXD__POLICY__ENABLED": text}).config.policy.enabled is False


@pytest.mark.parametrize("text", ["2", "y", "enabled", "tru", " true"])
def test_other_words_are_not_taken_for_false(write: Write, text: str) -> None:
    assert problems(write(""), {"PLEXD__POLICY__ENABLED": text}) == [
        "PLEXD__POLICY__ENABLED: policy.enabled: must be true, false, 1, 0, yes, no, on or off"
    ]


def test_unknown_generic_variables_are_mistakes(write: Write) -> None:
    environ = {"PLEXD__MESH__MTUU": "1", "PLEXD__MESH": "1", "PLEXD__WHATEVER": "1"}
    assert problems(write(""), environ) == [
        "PLEXD__MESH: mesh: names a section, not a key",
        "PLEXD__MESH__MTUU: mesh.mtuu: is unknown; did you mean mesh.mtu?",
        "PLEXD__WHATEVER: whatever: is unknown",
    ]


def test_other_unknown_variables_are_one_warning(write: Write) -> None:
    environ = {"PLEXD_APPI": "x", "PLEXD_A": "x", "PLEXD_BOOTSTRAP_TOKEN": "x", "PLEXD_MY": "x", "HOME": "/"}
    loaded = load_file(write("token: {env: PLEXD_MY}"), environ)
    assert loaded.warnings == ("unknown environment variables: PLEXD_A, PLEXD_APPI",)


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1}', "a=b"])
def test_map_in_a_variable_must_be_a_json_object_of_texts(write: Write, text: str) -> None:
    (problem,) = problems(write(""), {"PLEXD__REGISTRATION__METADATA": text})
    assert problem.startswith("PLEXD__REGISTRATION__METADATA: registration.metadata: must be a JSON object of texts")


def test_flag_is_validated_like_the_file(write: Write) -> None:
    assert problems(write(""), log_level="loud", data_dir="data") == [
        "--log-level: log_level: must be 'debug', 'info', 'warn' or 'error'",
        "--data-dir: data_dir: must be an absolute path",
    ]


def test_flag_of_another_subject_is_ignored(write: Write) -> None:
    assert load({"config": str(write("")), "force": "1"}, {}).config == Config()


# the file


def test_all_mistakes_are_said_at_once_with_their_lines(write: Write) -> None:
    path = write(
        """\
api: http://cp.example.net
mode: bridge
hostname: on
mesh:
  listen_prot: 1
  listen_port: 70000
  mtu: 60:30
  interface: far-too-long-a-name
  backend: kernal
heartbeat:
  interval: 30
reconcile: {interval: 500ms}
registration:
  metadata:
    rack: 12
    "": x
api: https://cp.example.net
"""
    )
    assert problems(path, {"PLEXD__TOKEN__VALUE": "sch\xf6n"}, data_dir="/plexd") == [
        "FILE:1: api: must be https:// unless the host is loopback or tls.insecure_skip_verify is set",
        "FILE:2: mode: must be node: bridge mode is not built yet in this version",
        "FILE:3: hostname: must be a text, but YAML reads it as a boolean: put it in quotes",
        "FILE:5: mesh.listen_prot: is unknown; did you mean listen_port?",
        "FILE:6: mesh.listen_port: must be less than or equal to 65535",
        "FILE:7: mesh.mtu: must be a whole number in plain decimal digits, without quotes",
        "FILE:8: mesh.interface: must be 1 to 15 letters, digits, dashes or underscores",
        "FILE:9: mesh.backend: must be 'auto', 'kernel' or 'userspace'",
        "FILE:11: heartbeat.interval: must be a duration with its unit, such as 90s or 1m30s",
        "FILE:12: reconcile.interval: must be at least 1s",
        "FILE:15: registration.metadata.rack: must be a text, but YAML reads it as a number: put it in quotes",
        "FILE:16: registration.metadata.: String should have at least 1 character",
        "FILE:17: api: is given twice, first on line 1",
        "--data-dir: data_dir: must have at least two components, such as /var/lib/plexd",
        "PLEXD__TOKEN__VALUE: token.value: must be 1 to 512 printable ASCII characters",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hostname: off", "FILE:1: hostname: must be a text, but YAML reads it as a boolean: put it in quotes"),
        ("hostname: 60:30", "FILE:1: hostname: must be a text, but YAML reads it as a number: put it in quotes"),
        ("hostname: 1e3", None),
        ("hostname: 2024-05-01",
         "FILE:1: hostname: must be a text, but YAML reads it as a date: put it in quotes"),
        ("hostname: 007", "FILE:1: hostname: must be a text, but YAML reads it as a number: put it in quotes"),
        ('hostname: "on"', None),
        ("mesh: {listen_port: 010}",
         "FILE:1: mesh.listen_port: must be a whole number in plain decimal digits, without quotes"),
        ("mesh: {listen_port: 0x50}",
         "FILE:1: mesh.listen_port: must be a whole number in plain decimal digits, without quotes"),
        ("mesh: {listen_port: true}",
         "FILE:1: mesh.listen_port: must be a whole number in plain decimal digits, without quotes"),
        ("mesh: {listen_port: 5e4}",
         "FILE:1: mesh.listen_port: must be a whole number in plain decimal digits, without quotes"),
        ('mesh: {listen_port: "80"}',
         "FILE:1: mesh.listen_port: must be a whole number in plain decimal digits, without quotes"),
        ('policy: {enabled: "false"}', "FILE:1: policy.enabled: must be true or false, without quotes"),
        ("policy: {enabled: 0}", "FILE:1: policy.enabled: must be true or false, without quotes"),
        ("policy: {enabled: off}", None),
        ("heartbeat: {interval: 1:30}",
         "FILE:1: heartbeat.interval: must be a duration with its unit, such as 90s or 1m30s"),
        ("heartbeat: {interval: 1.5}",
         "FILE:1: heartbeat.interval: must be a duration with its unit, such as 90s or 1m30s"),
        ("heartbeat: {interval: 0}", "FILE:1: heartbeat.interval: must be at least 5s"),
        ("heartbeat: {interval: 1 minute}",
         "FILE:1: heartbeat.interval: is not a duration; write it as 90s, 1m30s or 250ms"),
        ("heartbeat: {interval: true}",
         "FILE:1: heartbeat.interval: must be a text, but YAML reads it as a boolean: put it in quotes"),
        ("heartbeat: [30s]", "FILE:1: heartbeat: must be a mapping of names to values"),
        ("heartbeat: 30s", "FILE:1: heartbeat: must be a mapping of names to values"),
        ("hostname: [a]", "FILE:1: hostname: must be a single value"),
        ("registration: {metadata: [a]}", "FILE:1: registration.metadata: must be a mapping of names to values"),
        ("on: 1", "FILE:1: on: has a name that is not a text, but YAML reads it as a boolean: put it in quotes"),
        ("[a]: 1", "FILE:1: has a name that is not a text"),
        ("- api", "FILE:1: must be a mapping of names to values"),
        ("just text", "FILE:1: must be a mapping of names to values"),
        ("api: https://a\n---\napi: https://b",
         "FILE:2: is not valid YAML: a second document begins here; only one is allowed"),
        ("\nmesh: {", "FILE:2: is not valid YAML: expected the node content, but found '<stream end>'"),
        ("mesh:\n\tmtu: 0", "FILE:2: is not valid YAML: found character '\\t' that cannot start any token"),
        ("\nhostname: \x07", "FILE:2: the character '\\x07' is not allowed in YAML"),
        ("hostname: !!str x", "FILE:1: YAML tags are not allowed"),
        ("\nhostname: !!python/object/apply:os.system [id]", None),
        ("mesh: *nowhere", "FILE:1: is not valid YAML: found undefined alias 'nowhere'"),
        ("mesh: &mesh {mesh: *mesh}", "FILE:1: mesh.mesh: is unknown"),
        ("hostnam: x", "FILE:1: hostnam: is unknown; did you mean hostname?"),
        ("bridge: {}", "FILE:1: bridge: is unknown"),
        ("<<: {api: x}", "FILE:1: <<: is unknown"),
        ("[" * 5000, "FILE:1: is nested too deeply"),
        ("#" * (1 << 20) + "\n", "FILE:1: is larger than 1 MiB"),
    ],
)  # fmt: skip
def test_what_the_file_says_is_taken_literally_or_not_at_all(write: Write, text: str, expected: str | None) -> None:
    path = write(text)
    if expected is not None:
        assert expected in problems(path)
    elif "!!python" in text:
        assert problems(path)[0] == "FILE:2: YAML tags are not allowed"
    else:
        load_file(path)


def test_bytes_that_are_not_utf8_are_refused(write: Write) -> None:
    path = write("")
    path.write_bytes(b"api: https://cp.example.net\nhostname: \xff\n")
    assert problems(path) == ["FILE:2: is not UTF-8"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "~", "mesh:\napi: null\ntoken: {value: }\n", "\ufeff"])
def test_nothing_written_is_all_defaults(write: Write, text: str) -> None:
    assert load_file(write(text)).config == Config()


def test_anchor_can_be_used_again(write: Write) -> None:
    config = load_file(write("heartbeat: &often {interval: 10s}\nreconcile: *often\n")).config
    assert config.heartbeat.interval == config.reconcile.interval == timedelta(seconds=10)


def test_one_key_changes_no_other_default(write: Write) -> None:
    config = load_file(write("nat_traversal: {refresh_interval: 10s}\nmesh: {mtu: 1400}")).config
    assert config.nat_traversal.enabled is True
    assert config == Config(
        nat_traversal=Config().nat_traversal.model_copy(update={"refresh_interval": timedelta(seconds=10)}),
        mesh=Config().mesh.model_copy(update={"mtu": 1400}),
    )


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("nat_traversal:\n  stun_servers: []", 2, "nat_traversal.stun_servers"),
        ("nat_traversal:\n  stun_servers: stun.example.net:3478", 2, "nat_traversal.stun_servers"),
        ("nat_traversal:\n  stun_servers:\n  - stun.example.net:3478\n  - no-port", 4, "nat_traversal.stun_servers.1"),
        ("nat_traversal:\n  stun_servers:\n  - [2001:db8::1]:3478", 3, ""),
        ("nat_traversal:\n  stun_servers:\n  - a:1\n  - 12:30", 4, "nat_traversal.stun_servers.1"),
        ("nat_traversal:\n  stun_servers:\n  - {a: b}", 3, "nat_traversal.stun_servers.0"),
        ("nat_traversal:\n  enabled: false\n  stun_servers: [a]", 3, "nat_traversal.stun_servers.0"),
    ],
)
def test_list_is_judged_item_by_item(write: Write, text: str, line: int, key: str) -> None:
    (problem,) = problems(write(text))
    assert problem.startswith(f"FILE:{line}: {key}")


def test_default_that_another_key_makes_impossible_is_a_mistake_in_its_section(write: Write) -> None:
    text = "observe.batch_interval: must be at least observe.interval"
    assert problems(write("api: https://a\nobserve:\n  interval: 5m")) == [f"FILE:2: {text}"]
    assert problems(write("api: https://a"), {"PLEXD__OBSERVE__INTERVAL": "5m"}) == [text]
    assert load_file(write("observe: {interval: 5m, batch_interval: 5m}")).config.observe.batch_interval.seconds == 300


def test_stun_servers_may_be_left_out_where_none_is_asked(write: Write) -> None:
    text = "nat_traversal:\n  enabled: false\n  stun_servers: []"
    assert load_file(write(text)).config.nat_traversal.stun_servers == ()


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("api", ["https://cp.example.net:8443/base/", "http://localhost:1", "http://127.9.9.9", "http://[::1]:80"],
         ["cp.example.net", "ftp://x", "https://", "https://u:p@x", "https://x?q", "https://x#f", "https://x:0",
          "https://x:99999", "https://[x", "http://10.0.0.1", "https://x y", "https://\xfcber"]),
        ("data_dir", ["/a/b"], ["/", "/a", "a/b", "/a/../b", "/a/b\n"]),
        ("hostname", ["a", "x" * 253, " trimmed "], ["x" * 254, "a b", "a\tb", " "]),
        ("token.value", ["x", "with space", "x" * 512], ["x" * 513, "\xfc", "a\x07b"]),
        ("token.env", ["A", "_x9"], ["9A", "A-B", "A=B", "\xc4"]),
        ("token.metadata.base_url",
         ["http://169.254.169.254", "http://169.254.1.1:8080/base/", "https://127.0.0.1", "http://[::1]", "http://[fe80::1]",
          "http://localhost:1", "http://metadata.google.internal"],
         ["http://10.0.0.1", "https://192.0.2.1", "http://example.net", "http://x.metadata.google.internal", "ftp://[::1]",
          "169.254.169.254", "http://169.254.169.254?q", "http://u@127.0.0.1", "http://[2001:db8::1]"]),
        ("token.metadata.path", ["/", "/a?api-version=1&format=text"], ["", "a", "/a b", "/a#b", "/\xfc", "/a\n"]),
        ("token.metadata.timeout", ["100ms", "30s"], ["99ms", "30.001s", "0"]),
        ("token.metadata.wait", ["0", "1h"], ["-1s"]),
        ("registration.retry_for", ["10s", "1h"], ["9.999s", "-10s", "10", ""]),
        ("heartbeat.interval", ["5s", "5000ms"], ["4s"]),
        ("reconcile.interval", ["1s"], ["999ms"]),
        ("systemd.unit", ["plexd.service", "plexd@1.service"], ["-x", "a b", "", "a/b", "plexd.service\n"]),
        ("mesh.interface", ["wg-0_A", "x" * 15], ["", "x" * 16, "a.b", "a/b", "plexd0\n"]),
        ("mesh.listen_port", ["1", "65535"], ["0", "65536", "-1", "+1", "1_0", ""]),
        ("mesh.mtu", ["0", "1280", "9216"], ["1279", "9217", "-1", "1"]),
        ("mesh.persistent_keepalive", ["0", "65535"], ["-1", "65536", "25s"]),
        ("mesh.backend", ["auto", "kernel", "userspace"], ["Kernel", ""]),
        ("mesh.userspace_program", ["boringtun-cli", "/usr/bin/wireguard-go"], ["bin/wg", "./wg", "a b", "", "/"]),
        ("nat_traversal.refresh_interval", ["10s"], ["9s"]),
        ("nat_traversal.timeout", ["1ms", "30s"], ["0", "30.001s", "5"]),
        ("nat_traversal.fallback", ["relay", "none"], ["direct", ""]),
        ("nat_traversal.public_endpoint", ["", "192.0.2.1:1", "[2001:db8::1]:65535"],
         ["192.0.2.1", "cp.example.net:1", "2001:db8::1:1", "192.0.2.1:0", "192.0.2.256:1", "[192.0.2.1]:1"]),
        ("tls.ca_file", [], ["/does/not/exist", "/etc/hostname", "ca.pem", "/etc"]),
        ("log_format", ["auto", "console", "json", "journal"], ["text"]),
        ("observe.interval", ["5s"], ["4s"]),
        ("observe.batch_interval", ["15s"], ["14s", "1s"]),
        ("observe.batch_max_size", ["1", "10000"], ["0", "10001"]),
        ("observe.buffer_size", ["1000"], ["999"]),
        ("observe.max_batch_bytes", ["64KiB", "65536", "8MiB", "2 MiB"], ["65535", "9MiB", "1MB", "1M", "-1"]),
        ("observe.buffer_bytes", ["2MiB", "1024GiB"], ["2097151", "1025GiB"]),
        ("logs.max_line_size", ["256", "1MiB"], ["255", "2MiB"]),
        ("logs.filter.min_severity", ["", "err", "Error", "panic"], ["loud", "3"]),
        ("logs.journald.directory", ["", "/var/log/journal"], ["var/log"]),
        ("observe.latency_probes", ["1", "10"], ["0", "11"]),
        ("node_api.socket", ["/api.sock", "/" + "x" * 106], ["api.sock", "/" + "x" * 107, "/" + "\xfc" * 54]),
    ],
)  # fmt: skip
def test_bounds_of_each_key(write: Write, key: str, good: list[str], bad: list[str]) -> None:
    *sections, name = key.split(".")
    for text in good + bad:
        written: object = int(text) if KEYS[key] is int and text.lstrip("-").isascii() and text.isdigit() else text
        for section in [name, *reversed(sections)]:
            written = {section: written}
        path = write(json.dumps(written))  # which is YAML, too
        if text in good:
            load_file(path)
        else:
            (problem,) = problems(path)
            assert problem.startswith(f"FILE:1: {key}: "), text


def test_metadata_is_bounded(write: Write) -> None:
    def of(metadata: dict[str, str]) -> Path:
        return write(json.dumps({"registration": {"metadata": metadata}}))

    assert len(load_file(of({f"k{n}": "x" for n in range(64)})).config.registration.metadata) == 64
    load_file(of({"k" * 63: "x" * 1024}))
    assert problems(of({f"k{n}": "x" for n in range(65)}))
    assert problems(of({"k" * 64: "x"}))
    assert problems(of({"k": "x" * 1025}))


@pytest.mark.parametrize(
    "headers", [{"": "x"}, {"A B": "x"}, {"A:": "x"}, {"A": ""}, {"A": " x"}, {"A": "x\r\nB: y"}, {"A": "\xfc"},
                {f"H{n}": "x" for n in range(17)}],
)  # fmt: skip
def test_headers_for_the_metadata_service_are_headers(write: Write, headers: dict[str, str]) -> None:
    assert problems(write(json.dumps({"token": {"metadata": {"headers": headers}}})))


def test_token_of_white_space_is_no_token(write: Write) -> None:
    assert load_file(write('token: {value: " "}')).config.token.value is None


def test_plain_http_needs_the_switch(write: Write) -> None:
    loaded = load_file(write("tls: {insecure_skip_verify: true}\napi: http://10.0.0.1"))
    assert loaded.config.api == "http://10.0.0.1"
    assert loaded.warnings == ("tls.insecure_skip_verify is set: the control plane's certificate is not verified",)


def test_ca_file_with_a_certificate_is_taken(write: Write) -> None:
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    if not bundle.exists():
        pytest.skip("no certificate bundle on this host")
    assert load_file(write(f"tls: {{ca_file: {bundle}}}")).config.tls.ca_file == bundle


# no file, unusable file


def test_missing_default_file_leaves_environment_and_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plexd.config.layers.DEFAULT_PATH", tmp_path / "config.yaml")
    loaded = load({}, {"PLEXD_API": "https://cp.example.net"}, command="join")
    assert loaded.path is None
    assert loaded.config == Config(api="https://cp.example.net")


@pytest.mark.parametrize("by_flag", [True, False])
def test_missing_explicit_file_is_a_mistake(tmp_path: Path, by_flag: bool) -> None:
    name = str(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml: the configuration file does not exist"):
        load({"config": name} if by_flag else {}, {} if by_flag else {"PLEXD_CONFIG": name})


def test_flag_names_the_file_before_the_variable(write: Write) -> None:
    path = write("log_level: debug")
    assert load({"config": str(path)}, {"PLEXD_CONFIG": "/none"}).config.log_level == "debug"


def test_directory_is_no_configuration_file(tmp_path: Path) -> None:
    assert problems(tmp_path) == ["FILE: is a directory, not a configuration file"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read it")
def test_unreadable_file_is_a_mistake() -> None:
    program = (
        "import os, sys; from plexd.config.load import load; from plexd.errors import ConfigError\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: load({'config': sys.argv[1]}, {})\n"
        "except ConfigError as exc: print(exc)\n"
    )
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o711)
        path = Path(directory, "config.yaml")
        path.touch(0o600)
        done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{path}: the configuration file cannot be read: Permission denied\n"


@pytest.mark.parametrize(
    ("mode", "text", "warned"),
    [
        (0o640, "", []),
        (0o644, "", []),
        (0o660, "", ["written"]),
        (0o602, "", ["written"]),
        (0o640, "token: {value: hush}", []),
        (0o604, "token: {value: hush}", ["read"]),
        (0o666, "token: {value: hush}", ["written", "read"]),
    ],
)
def test_warning_for_file_mode(write: Write, mode: int, text: str, warned: list[str]) -> None:
    path = write(text)
    path.chmod(mode)
    loaded = load_file(path)
    assert len(loaded.warnings) == len(warned)
    assert all(f"can be {word} by" in warning for word, warning in zip(warned, loaded.warnings, strict=True))


# what a command needs


def test_up_and_join_need_a_control_plane(write: Write) -> None:
    path = write("policy: {enabled: false}")
    for command in ("up", "join"):
        (problem,) = problems(path, command=command)
        assert problem == ("api: is not set; give --api URL, set PLEXD_API, or write `api: https://...` into FILE")
    for command in ("down", "deregister", "config check"):
        load_file(path, command=command)


def test_mistaken_api_is_not_called_missing_as_well(write: Write) -> None:
    assert problems(write("api: [x]\npolicy: {enabled: false}"), command="up") == [
        "FILE:1: api: must be a single value"
    ]


def test_host_name_is_the_configured_one_or_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert effective_hostname(Config(hostname="edge-7")) == "edge-7"
    assert effective_hostname(Config()) == socket.gethostname()
    monkeypatch.setattr(socket, "gethostname", lambda: "a b")
    with pytest.raises(ConfigError, match="set hostname"):
        effective_hostname(Config())


# secrets


def test_secret_is_in_no_message_and_no_picture(write: Write) -> None:
    secret = "hush-hush-4711"
    token = f"token: {{value: {secret}, metadata: {{headers: {{X-Api: {secret}}}}}}}"
    loaded = load_file(write(f"{token}\nregistration: {{metadata: {{api_key: {secret}, place: cellar}}}}"))
    config = loaded.config
    assert config.token.value is not None
    assert config.token.value.get_secret_value() == secret
    assert secret not in repr(config.token)
    shown = redacted(config)
    assert secret not in json.dumps(shown)
    assert shown["registration"]["metadata"] == {"api_key": "[redacted]", "place": "cellar"}
    assert shown["token"] == {
        "value": "[redacted]",
        "file": "/etc/plexd/bootstrap-token",
        "env": "PLEXD_BOOTSTRAP_TOKEN",
        "metadata": {
            "enabled": False,
            "base_url": "http://169.254.169.254",
            "path": "/plexd/bootstrap-token",
            "headers": {"X-Api": "[redacted]"},
            "session": True,
            "base64": False,
            "timeout": "2s",
            "wait": "30s",
        },
    }
    assert secret not in as_yaml(config, loaded.origins)
    for bad in (f"token: {{value: {secret}\xfc}}", f"api: https://u:{secret}@x", f"api: https://x:{secret}"):
        assert secret not in "".join(problems(write(bad)))


@pytest.mark.parametrize("misread", ["47114711", "on", "2024-05-01"])
def test_token_that_yaml_reads_as_something_else_is_not_repeated(write: Write, misread: str) -> None:
    (problem,) = problems(write(f"token: {{value: {misread}}}"))
    assert problem.startswith("FILE:1: token.value: must be a text, but YAML reads it as a ")
    assert misread not in problem.split()


def test_what_is_shown_can_be_read_again(write: Write) -> None:
    config = load_file(write("""registration: {metadata: {"on": "on", a: "x\\ny", b: "60:30"}}""")).config
    config = config.model_copy(update={"hostname": "off", "api": "https://x"})
    again = load_file(write(as_yaml(config, dict.fromkeys(KEYS, "somewhere:1"))))
    assert again.config == config


# properties


@given(st.text(max_size=200))
def test_no_text_is_too_strange_for_a_sentence(text: str) -> None:
    """Whatever a file holds: a configuration or ConfigError, with the line in each problem."""
    document = read_document(text.encode("utf-8", "surrogatepass"), KEYS)
    lines = text.count("\n") + text.count("\r") + text.count("\x85") + text.count("\u2028") + text.count("\u2029") + 1
    assert all(1 <= problem.line <= lines for problem in document.problems)
    assert document.values.keys() <= KEYS.keys()


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_a_distance(one: str, other: str) -> None:
    distance = edit_distance(one, other)
    assert (distance == 0) == (one == other)
    assert distance == edit_distance(other, one)
    assert edit_distance(one + "x", one) == 1
    assert edit_distance(f"{one}xy", one) == 2


def test_loaded_is_a_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Loaded(Config(), None, {}, ()).path = Path("/x")  # type: ignore[misc]
