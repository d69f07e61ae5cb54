"""Workers of a deployment in a Redis, where routers of other hosts find them (`cluster.registry`).

One sorted set per deployment: signed channel addresses, by the second of the server's clock until which they are good. Who
can write there can hide workers or name addresses that lead nowhere; connections are made with the deployment's keys all
the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from python_backends.core.config import ClusterConfig
from python_backends.core.errors import ConfigError
from python_backends.core.signing import Domain, mac, sign, verify
from python_backends.core.tls import check_authority, check_certificate

GOOD_FOR_S = 15.0
RENEW_EVERY_S = 4.0
_TIMEOUT_S = 2.0


def set_name(key: bytes) -> str:
    """Of the sorted set; another one for every deployment that shares the Redis."""
    return f"baton:workers:{mac(Domain.REGISTRATION, b'', key)[:16].hex()}"


def seal_address(address: str, key: bytes) -> bytes:
    return sign(Domain.REGISTRATION, address.encode(), key)


def read_address(sealed: bytes, key: bytes) -> str | None:
    """None when nobody of the deployment wrote it."""
    body = verify(Domain.REGISTRATION, sealed, key)
    return None if body is None else body.decode()


def connection_options(cluster: ClusterConfig) -> dict[str, Any]:
    """Arguments for `from_url` of redis-py's clients, besides the URL. Raises ConfigError."""
    scheme = urlsplit(cluster.registry).scheme
    if scheme not in ("redis", "rediss"):
        raise ConfigError(f"cluster.registry: {cluster.registry!r} is no URL such as redis://host:6379 or rediss://host:6379")
    options: dict[str, Any] = {"protocol": 2, "socket_timeout": _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S}
    if cluster.registry_password_file:
        try:
            options["password"] = Path(cluster.registry_password_file).read_text().strip()
        except OSError as error:
            where = f"cluster.registry_password_file: {cluster.registry_password_file}"
            raise ConfigError(f"{where}: {error.strerror}; give a file with the password") from error
    if scheme == "rediss" and cluster.tls_ca:
        check_authority(cluster.tls_ca, "cluster.tls_ca")
        options["ssl_ca_certs"] = cluster.tls_ca
    if scheme == "rediss" and cluster.tls_certificate:
        check_certificate(cluster.tls_certificate, cluster.tls_key, "cluster.tls_certificate, tls_key")
        options |= {"ssl_certfile": cluster.tls_certificate, "ssl_keyfile": cluster.tls_key}
    return options
