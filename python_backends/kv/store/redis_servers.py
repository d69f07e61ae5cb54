"""The servers of a remote store, and which of them has a block: a list with consistent hashing, or one Redis Cluster."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import redis
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import RedisClusterException

from python_backends.core.config import RemoteStoreConfig
from python_backends.core.errors import ConfigError
from python_backends.core.tls import check_authority, check_certificate
from python_backends.core.types import BlockHash
from python_backends.kv.store.redis_wire import RedisServer, ReplyError
from python_backends.kv.store.ring import Ring

log = logging.getLogger(__name__)

_FAILURES = (redis.RedisError, RedisClusterException, OSError)  # of a cluster; the second is no kind of the first
_CONNECT_S = 0.25  # connecting and each step of the handshake
_LOOK_AGAIN_S = 1.0  # between two looks at who has which part of a cluster


class Servers(Protocol):
    def owner(self, hash_: BlockHash, key: bytes) -> RedisServer | None:
        """Who has the block of this hash, under this key. None when that can't be found out now."""

    def known(self) -> list[RedisServer]: ...

    def misled(self, error: ReplyError) -> None:
        """A server has answered with an error; maybe another one has the block now."""


def find_servers(config: RemoteStoreConfig) -> Servers:
    """Nothing is connected yet. Raises ConfigError for a wrong URL, a file that can't be read, or bad certificates."""
    for url in config.servers:
        if urlsplit(url).scheme not in ("redis", "rediss"):
            raise ConfigError(f"store.remote.servers: {url!r} is no URL such as redis://host:6379 or rediss://host:6379")
    return ClusterServers(config) if config.cluster else SeparateServers(config)


class SeparateServers:
    def __init__(self, config: RemoteStoreConfig) -> None:
        pools = [redis.ConnectionPool.from_url(url, **_options(config, url)) for url in config.servers]
        self._servers = {_name(url): RedisServer(_name(url), pool) for url, pool in zip(config.servers, pools, strict=True)}
        self._ring = Ring(list(self._servers))

    def owner(self, hash_: BlockHash, key: bytes) -> RedisServer | None:
        server = self._servers[self._ring.owner(hash_)]
        return server if server.up else None

    def known(self) -> list[RedisServer]:
        return list(self._servers.values())

    def misled(self, error: ReplyError) -> None:
        """Here the servers don't move."""


class ClusterServers:
    """Asks any node for the cluster's layout, and again when a node says that a block has moved."""

    def __init__(self, config: RemoteStoreConfig) -> None:
        self._options = _options(config, config.servers[0])
        parts = [urlsplit(url) for url in config.servers]
        self._start = [ClusterNode(part.hostname or "localhost", part.port or 6379) for part in parts]  # type: ignore[no-untyped-call]
        self._entrance = RedisServer(f"cluster at {_name(config.servers[0])}", redis.ConnectionPool())
        self._cluster: RedisCluster | None = None
        self._servers: dict[str, RedisServer] = {}
        self._lock = threading.Lock()
        self._looked = 0.0

    def owner(self, hash_: BlockHash, key: bytes) -> RedisServer | None:
        with self._lock:
            cluster = self._cluster or self._enter()
            if cluster is None:
                return None
            try:
                node = cluster.get_node_from_key(key)  # type: ignore[no-untyped-call]
                if node.name not in self._servers:
                    self._servers[node.name] = RedisServer(node.name, cluster.get_redis_connection(node).connection_pool)
            except _FAILURES:
                return None  # this part of the cluster is without a node now
            server = self._servers[node.name]
        return server if server.up else None

    def known(self) -> list[RedisServer]:
        with self._lock:
            return [*self._servers.values()] or [self._entrance]

    def misled(self, error: ReplyError) -> None:
        if str(error).split(" ")[0] not in ("MOVED", "ASK", "CLUSTERDOWN", "READONLY"):
            return
        with self._lock:
            if self._cluster is not None and time.monotonic() - self._looked > _LOOK_AGAIN_S:
                self._looked = time.monotonic()
                try:
                    self._cluster.nodes_manager.initialize()
                except _FAILURES as failure:
                    log.warning("remote store: the cluster can't be looked at: %s", failure)
                self._servers.clear()  # their connection pools may be new

    def _enter(self) -> RedisCluster | None:
        if not self._entrance.up:
            return None
        try:
            self._cluster = RedisCluster(startup_nodes=self._start, **self._options)
        except _FAILURES as error:
            self._entrance.failed(error)
        return self._cluster


def _options(config: RemoteStoreConfig, url: str) -> dict[str, Any]:
    """Of every connection. RESP 2, since in RESP 3 messages may come that nobody has asked for."""
    options: dict[str, Any] = {
        "protocol": 2,
        "socket_connect_timeout": _CONNECT_S,
        "socket_timeout": _CONNECT_S,
        "username": config.username or None,
        "password": _read_password(config.password_file) if config.password_file else None,
    }
    if urlsplit(url).scheme == "rediss":
        if config.ca_file:
            check_authority(config.ca_file, "store.remote.ca_file")
        if config.cert_file or config.key_file:
            check_certificate(config.cert_file, config.key_file, "store.remote.cert_file, key_file")
        options |= {
            "ssl_ca_certs": config.ca_file or None,
            "ssl_certfile": config.cert_file or None,
            "ssl_keyfile": config.key_file or None,
        }
        if config.cluster:
            options["ssl"] = True
    return {key: value for key, value in options.items() if value is not None}


def _read_password(path: str) -> str:
    try:
        return Path(path).read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is no text"
        raise ConfigError(f"store.remote.password_file: {path}: {why}") from error


def _name(url: str) -> str:
    """Host, port and database, without credentials."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 6379}{parts.path.rstrip('/')}"
