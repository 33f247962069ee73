"""Certificates and proxies, with real TLS."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from plexd.control import ControlPlane, tls_context
from plexd.errors import ConfigError, Transient
from plexd.lab.tls import TlsPaths, make_ca
from tests.control.rawserver import NODE_KEY, Client, RawServer, answer

PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "REQUEST_METHOD")


@pytest.fixture(autouse=True)
def _no_proxy_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(name="paths", scope="module")
def _paths(tmp_path_factory: pytest.TempPathFactory) -> TlsPaths:
    return make_ca(tmp_path_factory.mktemp("ca"), ["localhost", "cp.example.test"])


def server_context(paths: TlsPaths) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(paths.certificate_file, paths.key_file)
    return context


def run_tls(
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
    test: Callable[[Client, RawServer], Awaitable[None]],
    host: str = "localhost",
) -> None:
    async def main() -> None:
        async with RawServer(answer(200, b"{}")).running(server_tls) as server:
            client = Client(f"https://{host}:{server.port}", client_tls)
            try:
                await test(client, server)
            finally:
                await client.plane.close()

    asyncio.run(main())


async def succeed(client: Client, server: RawServer) -> None:
    await client.plane.state()
    assert server.received[0].bearer == NODE_KEY


def refused_for(reason: str, host: str = "localhost") -> Callable[[Client, RawServer], Awaitable[None]]:
    async def test(client: Client, server: RawServer) -> None:
        with capture_logs() as logs:
            for _ in range(3):
                with pytest.raises(Transient, match=reason):
                    await client.plane.state()
        assert server.received == []
        (line,) = (log for log in logs if log["log_level"] == "error")  # once a minute
        assert line["host"] == host
        assert reason in line["reason"]

    return test


def test_certificate_from_the_ca_file_is_trusted(paths: TlsPaths) -> None:
    run_tls(server_context(paths), tls_context(paths.ca_file), succeed)


def test_ca_file_is_added_to_the_system_store(paths: TlsPaths) -> None:
    system = tls_context().cert_store_stats()["x509_ca"]
    assert system > 0
    assert tls_context(paths.ca_file).cert_store_stats()["x509_ca"] == system + 1


def test_unknown_authority_is_refused(paths: TlsPaths) -> None:
    run_tls(server_context(paths), tls_context(), refused_for("unable to get local issuer certificate"))


def test_other_authority_is_refused(paths: TlsPaths, tmp_path: Path) -> None:
    run_tls(server_context(paths), tls_context(make_ca(tmp_path / "other").ca_file), refused_for("certificate"))


def test_certificate_for_another_host_is_refused(paths: TlsPaths) -> None:
    run_tls(
        server_context(paths), tls_context(paths.ca_file), refused_for("IP address mismatch", "127.0.0.1"), "127.0.0.1"
    )


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_insecure_flag_verifies_nothing(paths: TlsPaths, host: str) -> None:
    run_tls(server_context(paths), tls_context(insecure_skip_verify=True), succeed, host)


@pytest.mark.parametrize("insecure", [False, True])
def test_old_tls_is_refused(paths: TlsPaths, insecure: bool) -> None:
    context = tls_context(paths.ca_file, insecure_skip_verify=insecure)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


async def test_plain_http_from_a_tls_port_is_a_passing_failure() -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        client = Client(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        with pytest.raises(Transient):
            await client.plane.state()
        await client.plane.close()


@pytest.mark.parametrize("content", [None, b"", b"not a certificate"])
def test_unusable_ca_file_is_a_configuration_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"tls\.ca_file"):
        tls_context(path)


# proxies


class Proxy:
    """Knows CONNECT; joins every tunnel with a port of this machine and keeps what it could read."""

    def __init__(self, target: int) -> None:
        self.heard = b""
        self.port = 0
        self._target = target

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heard += await reader.readuntil(b"\r\n\r\n")
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._target)
        writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        await asyncio.gather(self._pump(reader, inner_writer), self._pump(inner_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                self.heard += data
                writer.write(data)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_proxy_carries_tls_and_hears_no_credential(paths: TlsPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    async with RawServer(answer(200, b"{}")).running(server_context(paths)) as server:
        async with Proxy(server.port).running() as proxy:
            monkeypatch.setenv("HTTPS_PROXY", f"http://user:pass@127.0.0.1:{proxy.port}")
            client = Client("https://cp.example.test", tls_context(paths.ca_file))
            await client.plane.state()
            await client.plane.close()
        assert server.received[0].bearer == NODE_KEY
        assert proxy.heard.startswith(b"CONNECT cp.example.test:443 HTTP/1.1\r\n")
        assert b"proxy-authorization: basic dxnlcjpwyxnz" in proxy.heard.lower()
        assert b"plexd" not in proxy.heard
        assert NODE_KEY.encode() not in proxy.heard


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
async def test_loopback_is_never_reached_through_a_proxy(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with RawServer(answer(200, b"{}")).running() as proxy, RawServer(answer(200, b"{}")).running() as server:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
        for host in ("127.0.0.1", "localhost"):
            client = Client(f"http://{host}:{server.port}")
            await client.plane.state()
            await client.plane.close()
        assert proxy.connections == 0
        assert len(server.received) == 2


@pytest.mark.parametrize(
    ("api", "excepted", "proxied"),
    [
        ("https://cp.example.test", "", True),
        ("https://cp.example.test", "example.test", False),
        ("https://cp.example.test", ".example.test", False),
        ("https://cp.example.test", "cp.example.test:8443", True),
        ("https://cp.example.test:8443", "cp.example.test:8443", False),
        ("https://cp.example.test", "*", False),
        ("https://192.0.2.7", "192.0.2.0/24", False),
        ("https://192.0.2.7:8443", "10.0.0.0/8,192.0.2.7", False),
        ("https://192.0.2.7", "10.0.0.0/8", True),
        ("https://[2001:db8::7]", "2001:db8::/32", False),
        ("https://[2001:db8::7]:8443", "2001:db8::7", False),
    ],
)
def test_no_proxy_names_exceptions(api: str, excepted: str, proxied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1080")  # one that is noticed as soon as it would be used
    monkeypatch.setenv("NO_PROXY", excepted)
    if proxied:
        with pytest.raises(ConfigError, match="socks5 proxies are not supported"):
            ControlPlane(api, tls_context(insecure_skip_verify=True))
    else:
        ControlPlane(api, tls_context(insecure_skip_verify=True))


@pytest.mark.parametrize("value", ["http://", "http:///x", "http://a:b:c"])
def test_unusable_proxy_is_a_configuration_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", value)
    with pytest.raises(ConfigError, match="HTTPS_PROXY"):
        ControlPlane("https://cp.example.test", tls_context(insecure_skip_verify=True))
