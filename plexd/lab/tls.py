"""A certificate authority of our own, and a server certificate from it, for a control plane without a public name.

The authority is kept in its directory, so agents that were given its file keep trusting the lab after a restart; the
server certificate is made anew each time, for the hosts asked for.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from plexd.store.files import write_whole

_DAY = dt.timedelta(days=1)


class TlsPaths(NamedTuple):
    """What `tls.ca_file` of an agent should name, and what the server loads."""

    ca_file: Path
    certificate_file: Path
    key_file: Path


def make_ca(directory: Path, hosts: Iterable[str] = ("localhost", "127.0.0.1", "::1")) -> TlsPaths:
    """Writes `ca.pem`, `server.pem` and `server.key` below `directory`; an authority already there is used again.

    OSError when the directory can't be written, ValueError when the authority in it is damaged, or may be
    somebody else's.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:  # somebody else's authority must not become ours
        raise ValueError("it must belong to you, and nobody else may write in it")
    paths = TlsPaths(directory / "ca.pem", directory / "server.pem", directory / "server.key")
    ca_key_file = directory / "ca.key"
    if paths.ca_file.exists() and ca_key_file.exists():
        ca, ca_key = _load(paths.ca_file, ca_key_file)
    else:
        ca, ca_key = _authority()
        write_whole(ca_key_file, _key_pem(ca_key))
        write_whole(paths.ca_file, ca.public_bytes(serialization.Encoding.PEM))
        paths.ca_file.chmod(0o644)  # every agent reads it
    certificate, key = _server(ca, ca_key, tuple(hosts))
    write_whole(paths.key_file, _key_pem(key))
    write_whole(paths.certificate_file, certificate.public_bytes(serialization.Encoding.PEM))
    return paths


def _load(certificate_file: Path, key_file: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
    key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(  # noqa: TRY004 - the file is wrong, not a type
            f"{key_file} holds no key of ours; remove it and {certificate_file} to make a new authority"
        )
    return certificate, key


def _authority() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "plexd lab authority")])
    certificate = (
        _builder(name, name, key, lifetime=3650 * _DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def _server(
    ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey, hosts: tuple[str, ...]
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "plexd lab control plane")])
    certificate = (
        _builder(name, ca.subject, key, lifetime=365 * _DAY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return certificate, key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, lifetime: dt.timedelta
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)  # tolerates an agent whose clock is behind
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
