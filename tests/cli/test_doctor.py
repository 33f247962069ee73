"""`plexd doctor` in network namespaces that are crippled in one way each: it names that one, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.namespaces import marks

PLEXD = Path(sys.executable).with_name("plexd")

pytestmark = marks("nft", "setpriv", "unshare", seconds=240)

SERVER = """
import http.server, ssl, sys, time
shift, certificate = float(sys.argv[1]), sys.argv[2]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def date_time_string(self, timestamp=None):
        return super().date_time_string(time.time() + shift)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
if certificate:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_address[1], flush=True)
server.serve_forever()
"""
HOLDER = """
import socket, sys, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", int(sys.argv[1])))
print("held", flush=True)
time.sleep(1000)
"""


class Ward:
    """A network namespace with a control plane that answers pings, and a configuration that fits to both."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = f"plxd-{os.getpid()}"
        self.inside = ["ip", "netns", "exec", self.name]
        self.data = directory / "data"
        self.config: dict[str, Any] = {}
        self._helpers: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        self.data.mkdir()
        (self.directory / "token").write_text("t")
        self.run("ip", "netns", "add", self.name)
        self.run("ip", "-n", self.name, "link", "set", "lo", "up")
        self.config = {
            "data_dir": str(self.data),
            "token": {"file": str(self.directory / "token")},
            "mesh": {"interface": "plxd-none"},
        }
        return self

    def __exit__(self, *_: object) -> None:
        for helper in self._helpers:
            helper.kill()
            helper.communicate()
        self.run("ip", "netns", "delete", self.name)
        shutil.rmtree(f"/etc/netns/{self.name}", ignore_errors=True)

    def run(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    def helper(self, program: str, *arguments: str) -> str:
        """Runs it inside; the first line it says."""
        helper = subprocess.Popen(
            [*self.inside, sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True
        )
        self._helpers.append(helper)
        assert helper.stdout is not None
        return helper.stdout.readline().strip()

    def serve(self, *, shift: float = 0.0, certificate: str = "") -> None:
        port = self.helper(SERVER, str(shift), certificate)
        self.config["api"] = f"{'https' if certificate else 'http'}://127.0.0.1:{port}"

    def examine(self, *through: str) -> tuple[int, list[dict[str, str]]]:
        """Exit code and findings; `through` are words that run the rest of the command."""
        path = self.directory / "config.yaml"
        path.write_text(json.dumps(self.config))
        done = subprocess.run(
            [*self.inside, *through, PLEXD, "doctor", "--json", "--config", str(path)],
            capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]},
        )  # fmt: skip
        assert done.stderr == ""
        return done.returncode, json.loads(done.stdout)["findings"]

    def names(self, check: str, words: str, *through: str) -> None:
        code, findings = self.examine(*through)
        assert [finding["check"] for finding in findings] == [check], findings
        assert code == 1
        (finding,) = findings
        assert words in finding["cause"], finding
        assert finding["remedy"]


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    with Ward(tmp_path) as ward:
        yield ward


def with_mount(mount: str) -> list[str]:
    """In a mount namespace of its own, after that command."""
    return ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]


def test_healthy_machine_has_no_findings(ward: Ward) -> None:
    ward.serve()
    assert ward.examine() == (0, [])
    path = ward.directory / "config.yaml"
    done = subprocess.run([*ward.inside, PLEXD, "doctor", "--config", path], capture_output=True, text=True, check=True)
    assert done.stdout == "ok: nothing is missing\n"


@pytest.mark.parametrize("capability", ["net_admin", "net_raw"])
def test_missing_capability(ward: Ward, capability: str) -> None:
    ward.serve()
    if capability == "net_admin":
        ward.config["policy"] = {"enabled": False}  # nft fails as well, of course
    without = ("setpriv", f"--bounding-set=-{capability}", f"--inh-caps=-{capability}")
    ward.names("capabilities", f"CAP_{capability.upper()} is missing", *without)


def test_hidden_tun(ward: Ward) -> None:
    ward.serve()
    ward.names("tun", "/dev/net/tun is missing", *with_mount("mount -t tmpfs none /dev/net"))


def test_neither_module_nor_program(ward: Ward) -> None:
    ward.serve()
    ward.config["mesh"]["userspace_program"] = "wireguard-none"
    ward.names("wireguard", "no WireGuard, and wireguard-none is not installed")


def test_no_module_where_only_the_kernel_will_do(ward: Ward) -> None:
    ward.serve()
    ward.config["mesh"]["backend"] = "kernel"
    ward.names("wireguard", "this kernel has no WireGuard")


def test_no_nft(ward: Ward) -> None:
    ward.serve()
    nft = shutil.which("nft", path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    ward.names("nftables", "nft is not installed", *with_mount(f"mount --bind /dev/null {os.path.realpath(nft or '')}"))


def test_port_taken(ward: Ward) -> None:
    ward.serve()
    ward.config["mesh"]["listen_port"] = 41820
    assert ward.helper(HOLDER, "41820") == "held"
    ward.names("port", "another program holds UDP port 41820")


@pytest.mark.parametrize(("shift", "side"), [(3600, "behind"), (-3600, "ahead of")])
def test_clock_an_hour_off(ward: Ward, shift: float, side: str) -> None:
    ward.serve(shift=shift)
    ward.names("clock", side)


def test_dead_dns(ward: Ward) -> None:
    directory = Path("/etc/netns") / ward.name
    directory.mkdir(parents=True)
    (directory / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    ward.config["api"] = "https://cp.plexd.test"
    ward.names("dns", "cp.plexd.test does not resolve")


def test_control_plane_that_is_not_there(ward: Ward) -> None:
    ward.config["api"] = "http://127.0.0.1:1"
    ward.names("control_plane", "nobody answers at 127.0.0.1 port 1: Connection refused")


def test_certificate_of_another_ca(ward: Ward) -> None:
    ward.serve(certificate=make_certificate(ward.directory))
    ward.names("tls", "the certificate of 127.0.0.1 is not trusted")
    ward.config["tls"] = {"ca_file": str(ward.directory / "certificate.pem")}
    assert ward.examine() == (0, [])


def test_read_only_data_directory(ward: Ward) -> None:
    ward.serve()
    ward.names(
        "data_dir", f"{ward.data} cannot be written: Read-only", *with_mount(f"mount -t tmpfs -o ro none {ward.data}")
    )


def test_ipv6_off(ward: Ward) -> None:
    ward.serve()
    ward.run(*ward.inside, "sysctl", "-w", "net.ipv6.conf.all.disable_ipv6=1")
    ward.names("ipv6", "IPv6 is off")


def test_large_packets_that_get_lost(ward: Ward) -> None:
    ward.serve()
    for rule in (
        "add table inet hole",
        "add chain inet hole out { type filter hook output priority 0; }",
        "add rule inet hole out meta length > 3000 drop",
    ):
        ward.run(*ward.inside, "nft", rule)
    ward.names("mtu", "large ones get lost")


def test_no_token_and_no_identity(ward: Ward) -> None:
    ward.serve()
    (ward.directory / "token").unlink()
    ward.names("token", "there is no bootstrap token")
    (ward.data / "identity.json").write_text("{}")
    assert ward.examine() == (0, [])


def test_configuration_with_mistakes_names_them_all(ward: Ward) -> None:
    ward.config |= {"api": "ftp://x", "mode": "router"}
    code, findings = ward.examine()
    assert (code, [finding["check"] for finding in findings]) == (1, ["configuration"] * 2)


def make_certificate(directory: Path) -> str:
    """Self-signed, for 127.0.0.1; its path, key included."""
    path, key = directory / "certificate.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=control plane", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", path],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + key.read_text())
    return str(path)
