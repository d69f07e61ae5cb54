"""Keeps a worker's channel address in the deployment's registry as long as the worker lives."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from python_backends.core.config import ClusterConfig
from python_backends.core.registration import GOOD_FOR_S, RENEW_EVERY_S, connection_options, seal_address, set_name

log = logging.getLogger(__name__)


class Registration:
    """Its own thread says again and again that the worker is there. A registry that is down is tried again; nobody waits."""

    def __init__(self, cluster: ClusterConfig, address: str, key: bytes) -> None:
        """`address`: where routers of other hosts connect. Raises ConfigError for a wrong URL or password file."""
        self._client = redis.Redis.from_url(cluster.registry, retry=Retry(NoBackoff(), 0), **connection_options(cluster))
        self._set = set_name(key)
        self._entry = seal_address(address, key)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registration", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Take the address out, if the registry answers. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)
        with suppress(redis.RedisError):
            self._client.zrem(self._set, self._entry)
        self._client.close()

    def _run(self) -> None:
        up = True
        while not self._closing.is_set():
            try:
                self._renew()
                up = True
            except redis.RedisError as error:
                if up:
                    log.warning("cluster.registry can't be told of this worker: %s; trying on", error)
                up = False
            self._closing.wait(RENEW_EVERY_S)

    def _renew(self) -> None:
        now = self._client.time()[0]  # the server's: hosts' clocks may differ
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.zadd(self._set, {self._entry: now + GOOD_FOR_S})
            pipeline.zremrangebyscore(self._set, "-inf", now)
            pipeline.expire(self._set, int(GOOD_FOR_S * 4))
            pipeline.execute()
