"""Reading prompts' blocks from the stores, on threads of its own: a slow store never delays a running stream."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from python_backends.core.config import StoreConfig
from python_backends.core.types import BlockHash
from python_backends.engines.paged.sequence import Sequence
from python_backends.kv.block_pool import BlockPool
from python_backends.kv.store.stores import Loaded, Stores

log = logging.getLogger(__name__)

_THREADS = 2
_PREFETCH_S = 2.0  # given to bringing one waiting prompt's blocks nearer
_PREFETCH_MOST = 16  # prompts of the queue that are prefetched


class StoreLoads:
    """Belongs to the engine's thread, but for `locate`. Closes the stores."""

    def __init__(
        self,
        stores: Stores,
        config: StoreConfig,
        pool: BlockPool,
        call: Callable[[Callable[[], None]], None],
        on_loaded: Callable[[Sequence, Loaded], None],
    ) -> None:
        """call: has the engine's thread do something. on_loaded is told there how each of the loads ended."""
        self._stores = stores
        self._config = config
        self._pool = pool
        self._call = call
        self._on_loaded = on_loaded
        self._loaders = ThreadPoolExecutor(_THREADS, thread_name_prefix="load")
        self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def begin(self, sequence: Sequence) -> Future[None]:
        """Look for the uncached full blocks. The sequence's blocks belong to the reading thread until it is done."""
        span = slice(sequence.num_published, len(sequence.reusable_hashes()))
        return self._loaders.submit(self._load, sequence, sequence.hashes[span], sequence.blocks[span])

    def prefetch(self, waiting: Many[Sequence]) -> None:
        """A prompt that must wait for its turn uses the time: what the farther stores have of it comes nearer."""
        if not self._stores.can_prefetch:
            return
        for sequence in waiting[:_PREFETCH_MOST]:
            if sequence.may_be_stored and not sequence.prefetching:
                sequence.prefetching = True
                hashes = sequence.reusable_hashes()
                self._prefetcher.submit(self._prefetch, hashes[self._pool.match(hashes) :])

    def locate(self, hashes: Many[BlockHash], on_located: Callable[[int], None]) -> None:
        """See engines.base.StoreReader."""
        deadline = time.monotonic() + self._config.locate_timeout_s
        self._loaders.submit(lambda: on_located(self._stores.locate(hashes, deadline)))

    def close(self) -> None:
        """Any thread may call it, once no load can begin."""
        self._loaders.shutdown(wait=True, cancel_futures=True)
        self._prefetcher.shutdown(wait=True, cancel_futures=True)
        self._stores.close()

    def _load(self, sequence: Sequence, hashes: list[BlockHash], targets: list[int]) -> None:
        """On a reading thread."""
        loaded = Loaded()
        try:
            loaded = self._stores.load(hashes, targets, time.monotonic() + self._config.read_timeout_s)
        except Exception:  # a sequence must never be lost because a store has a bug
            log.exception("reading from the stores failed")
        self._call(partial(self._on_loaded, sequence, loaded))

    def _prefetch(self, hashes: list[BlockHash]) -> None:
        """On the prefetching thread."""
        try:
            self._stores.prefetch(hashes, time.monotonic() + _PREFETCH_S)
        except Exception:  # nobody waits for it
            log.exception("prefetching failed")
