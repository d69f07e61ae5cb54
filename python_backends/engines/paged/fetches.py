"""Fetching the KV of tickets, on threads of its own: a slow or hanging transfer never delays a running stream."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from python_backends.core.errors import HandoffRefused, RefusalReason
from python_backends.core.handoff import KVHandoff
from python_backends.core.layout import KVLayout
from python_backends.engines.paged.sequence import Sequence
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer.base import Fetched, KVTransport
from python_backends.kv.transfer.conversion import fetch_converted

log = logging.getLogger(__name__)

_THREADS = 2

OnFetched = Callable[[Sequence, int, float, Fetched | HandoffRefused], None]
"""The sequence, how many of its blocks were wanted, milliseconds, and how it went."""


class Fetches:
    """Belongs to the engine's thread."""

    def __init__(
        self,
        transport: KVTransport,
        memory: PoolMemory,
        layout: KVLayout,
        timeout_s: float,
        call: Callable[[Callable[[], None]], None],
        on_fetched: OnFetched,
    ) -> None:
        """layout: of the KV in `memory`. call: has the engine's thread do something.

        on_fetched is told there how each transfer ended.
        """
        self._transport = transport
        self._memory = memory
        self._layout = layout
        self._timeout_s = timeout_s
        self._call = call
        self._on_fetched = on_fetched
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch")

    def begin(self, sequence: Sequence, handoff: KVHandoff, wanted: Many[int]) -> Future[None]:
        """Of the ticket's blocks those at these positions. The sequence's blocks belong to the transfer until it returns."""
        targets = [sequence.blocks[position] for position in wanted]
        return self._threads.submit(self._fetch, sequence, handoff, list(wanted), targets)

    def end(self, sequence: Sequence, outcome: Fetched | HandoffRefused) -> None:
        """As if a transfer of nothing had ended so."""
        sequence.fetched_at = time.monotonic()
        self._call(partial(self._on_fetched, sequence, 0, 0.0, outcome))

    def close(self) -> None:
        """Any thread may call it, once no transfer can begin."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, sequence: Sequence, handoff: KVHandoff, wanted: list[int], targets: list[int]) -> None:
        """On a transfer thread: move and verify the bytes, then tell the engine's thread."""
        began = time.monotonic()
        outcome: Fetched | HandoffRefused
        try:
            memory, deadline = self._memory, began + self._timeout_s
            exact = not sequence.was_handed  # who borrows hands it on, and has others find it
            if handoff.layout == self._layout:
                outcome = self._transport.fetch(handoff, wanted, memory, targets, deadline, exact=exact)
            else:
                first = wanted[0] * sequence.block_size
                outcome = fetch_converted(self._transport, handoff, first, self._layout, memory, targets, deadline, exact=exact)
        except HandoffRefused as error:
            outcome = error
        except Exception as error:  # a sequence must never be lost because a transport has a bug
            log.exception("transfer failed")
            outcome = HandoffRefused(RefusalReason.TRANSFER_FAILED, repr(error))
        sequence.fetched_at = time.monotonic()
        taken_ms = (sequence.fetched_at - began) * 1e3
        self._call(partial(self._on_fetched, sequence, len(wanted), taken_ms, outcome))
