"""Transport `shm`: one copy at memory speed from the source worker's pool, mapped read-only, on the same host."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from python_backends.core.errors import HandoffRefused, RefusalReason
from python_backends.core.handoff import KVHandoff
from python_backends.core.types import Epoch
from python_backends.kv.memory import PoolMemory, PoolView
from python_backends.kv.transfer.base import Arrived, CheckedTransport, Published, check_time, failed

_MAX_VIEWS = 16  # pools of other workers kept mapped
_SHARED_BYTES = 8 << 20  # from here on a second thread copies half: with a core to spare, that takes half the time
_PIECE_BYTES = 4 << 20  # about 1 ms: how long a copy may run before it looks at the clock


class ShmTransport(CheckedTransport):
    """Keeps the mappings of recently read pools; each is dropped when its owner dies, so that its memory is freed."""

    def __init__(self) -> None:
        self.name = "shm"
        self._lock = threading.Lock()  # of the mappings; not held while copying
        self._helpers = ThreadPoolExecutor(2, thread_name_prefix="shm")
        self._views: OrderedDict[tuple[str, Epoch], PoolView] = OrderedDict()  # least recently used first

    def publish(self, memory: PoolMemory, blocks: Sequence[int], lease_id: str) -> Published:
        """The blocks are readable where they are."""
        return Published(locator=memory.locator)

    def release(self, lease_id: str) -> None:
        """A reader sees by the generations when blocks are written anew."""

    def copy(
        self,
        handoff: KVHandoff,
        wanted: Sequence[int],
        into: PoolMemory,
        blocks: Sequence[int],
        deadline: float,
        arrived: Arrived,
        *,
        exact: bool,
    ) -> None:
        """See CheckedTransport.copy. numpy gives up the GIL while it copies."""
        check_time(deadline)
        view = self._attach(handoff)
        source = claimed(handoff, wanted, view)

        def copy_some(first: int, last: int) -> None:
            done = first
            for start, target, count in _runs(source[first:last], blocks[first:last], max(1, _PIECE_BYTES // view.block_bytes)):
                check_time(deadline)
                into.blocks[target : target + count] = view.blocks[start : start + count]
                arrived(range(done, done + count))
                done += count

        half = len(wanted) // 2 if len(wanted) * view.block_bytes >= _SHARED_BYTES else 0
        helper = self._helpers.submit(copy_some, 0, half) if half else None
        try:
            copy_some(half, len(wanted))
        finally:
            if helper is not None:
                wait([helper])  # nobody may write into the pool after us
        if helper is not None:
            helper.result()
        check_fresh(handoff, wanted, view)

    def close(self) -> None:
        self._helpers.shutdown(wait=True)
        with self._lock:
            self._views.clear()

    def _attach(self, handoff: KVHandoff) -> PoolView:
        key = (handoff.locator, handoff.epoch)
        with self._lock:
            self._drop_abandoned()
            view = self._views.get(key) or open_view(handoff)
            self._views[key] = view
            self._views.move_to_end(key)
            if len(self._views) > _MAX_VIEWS:
                self._views.popitem(last=False)
        return view

    def _drop_abandoned(self) -> None:
        """A mapping holds all memory of its pool, also of a dead owner's."""
        for key in [key for key, view in self._views.items() if not view.owned]:
            del self._views[key]


def open_view(handoff: KVHandoff) -> PoolView:
    """The source's pool memory. Raises HandoffRefused when it is gone, or another than the ticket says."""
    try:
        view = PoolView(handoff.locator)
    except OSError as error:
        raise failed(f"the KV pool of {handoff.source} is gone ({error.strerror})") from error
    except ValueError as error:
        raise failed(str(error)) from error
    if view.epoch != handoff.epoch:
        raise HandoffRefused(RefusalReason.STALE_EPOCH, f"{handoff.source} has restarted since the ticket")
    if view.block_bytes != handoff.layout.block_bytes:
        raise failed(f"{handoff.source} has blocks of {view.block_bytes} bytes, its ticket says {handoff.layout.block_bytes}")
    return view


def claimed(handoff: KVHandoff, wanted: Sequence[int], view: PoolView) -> list[int]:
    """Block numbers in the source's pool."""
    source = [handoff.blocks[position] for position in wanted]
    if any(not 0 <= block < view.num_blocks for block in source):
        raise failed(f"the ticket names a block that the pool of {handoff.source} does not have")
    return source


def _runs(source: Sequence[int], target: Sequence[int], longest: int) -> Iterator[tuple[int, int, int]]:
    """(first source block, first target block, count) of stretches that are consecutive on both sides."""
    start = 0
    for i in range(1, len(source) + 1):
        ends = i == len(source) or i - start == longest
        if ends or source[i] != source[i - 1] + 1 or target[i] != target[i - 1] + 1:
            yield source[start], target[start], i - start
            start = i


def check_fresh(handoff: KVHandoff, wanted: Sequence[int], view: PoolView) -> None:
    """The owner bumps a generation before it writes, so one that is unchanged after the copy says that nobody wrote."""
    for position in wanted:
        if view.generations[handoff.blocks[position]] != handoff.generations[position]:
            raise HandoffRefused(RefusalReason.STALE_EPOCH, f"{handoff.source} has reused block {position} since the ticket")
    if view.epoch != handoff.epoch:
        raise HandoffRefused(RefusalReason.STALE_EPOCH, f"{handoff.source} has closed its KV pool")
