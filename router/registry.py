"""Where workers are, as they say themselves in the deployment's Redis (`cluster.registry`). A source of discovery.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from python_backends.core.config import ClusterConfig
from python_backends.core.registration import connection_options, read_address, set_name

_KEPT_S = 30.0
"""For so long after it was read last an address is believed: a registry that was flushed or restarted has to hear of the
workers again. That a worker is gone is heard from the channel."""


class Registry:
    """A Source: call it for the addresses that are known now."""

    def __init__(self, cluster: ClusterConfig, key: bytes) -> None:
        """Raises ConfigError for a wrong URL or password file."""
        self._client = redis.Redis.from_url(cluster.registry, retry=Retry(NoBackoff(), 0), **connection_options(cluster))
        self._key = key
        self._seen: dict[str, float] = {}  # address -> monotonic s

    async def __call__(self) -> Iterable[str]:
        """Raises OSError while the registry can't be read."""
        try:
            # On a thread: redis-py's own asyncio client swallows cancellations.
            entries = await asyncio.to_thread(self._read)
        except redis.RedisError as error:
            raise OSError(f"cluster.registry: {error}") from error
        now = time.monotonic()
        for entry in entries:
            address = read_address(entry, self._key)
            if address is not None:
                self._seen[address] = now
        self._seen = {address: seen for address, seen in self._seen.items() if now - seen <= _KEPT_S}
        return list(self._seen)

    def _read(self) -> list[bytes]:
        seconds = self._client.time()[0]
        found = self._client.zrangebyscore(set_name(self._key), seconds, "+inf")
        return [entry for entry in found if isinstance(entry, bytes)]
