"""Certificates for tests of TLS."""

from __future__ import annotations

from pathlib import Path

import trustme


def write_certificates(directory: Path) -> Path:
    """ca.pem, other-ca.pem (of somebody else), and 127.0.0.1 and client, each .pem and .key."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(directory / "other-ca.pem"))
    for name in ("127.0.0.1", "client"):
        certificate = authority.issue_cert(name)
        certificate.private_key_pem.write_to_path(str(directory / f"{name}.key"))
        certificate.cert_chain_pems[0].write_to_path(str(directory / f"{name}.pem"))
    return directory


def redis_arguments(certificates: Path) -> list[str]:
    """For a redis-server that speaks TLS and asks for a certificate."""
    files = {"cert": "127.0.0.1.pem", "key": "127.0.0.1.key", "ca-cert": "ca.pem"}
    return [part for name, file in files.items() for part in (f"--tls-{name}-file", str(certificates / file))]
