"""Which worker channels there are to connect to, and how that changes: static lists, DNS names, a Redis registry."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence

from python_backends.core.config import ClusterConfig, PoolConfig
from router.registry import Registry

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 2.0

Source = Callable[[], Awaitable[Iterable[str]]]
"""Addresses as they are now. Raises OSError when that can't be told at the moment."""


class Discovery:
    """Keeps a consumer told of the addresses, `own` ones first and always."""

    def __init__(self, own: Sequence[str], sources: Sequence[Source], consumer: Callable[[Iterable[str]], None]) -> None:
        self._own = list(own)
        self._sources = list(sources)
        self._consumer = consumer
        self._found: list[set[str]] = [set() for _ in sources]
        self._troubles: list[set[str]] = [set() for _ in sources]  # that the log says already, since a source failed first

    async def watch(self) -> None:
        """Until cancelled. A source that fails keeps what it said last: a name server's trouble is not the workers'."""
        self._consumer(self._own)
        while self._sources:
            for index, source in enumerate(self._sources):
                try:
                    self._found[index] = set(await source())
                except OSError as error:
                    self._failed(index, str(error))
                else:
                    self._worked(index)
            self._consumer([*self._own, *sorted(set().union(*self._found))])
            await asyncio.sleep(_LOOK_EVERY_S)

    def _failed(self, index: int, why: str) -> None:
        if why not in self._troubles[index]:
            log.warning("workers can't be looked up: %s; keeping the %d known, trying on", why, len(self._found[index]))
        self._troubles[index].add(why)

    def _worked(self, index: int) -> None:
        if self._troubles[index]:
            log.info("workers can be looked up again")
        self._troubles[index].clear()


def sources_of(cluster: ClusterConfig, key: bytes) -> list[Source]:
    """Of a deployment's pools and registry. Raises ConfigError."""
    registry: list[Source] = [Registry(cluster, key)] if cluster.registry else []
    return [*(pool_source(pool) for pool in cluster.pools), *registry]


def pool_source(pool: PoolConfig) -> Source:
    async def look_up() -> Iterable[str]:
        hosts = await _addresses(pool.dns) if pool.dns else pool.hosts
        return [f"tcp://{host}:{port}" for host in hosts for port in pool.channel_ports]

    return look_up


async def _addresses(name: str) -> list[str]:
    """All IPv4 addresses of a name."""
    found = await asyncio.get_running_loop().getaddrinfo(name, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
    return sorted({str(entry[4][0]) for entry in found})
