"""What a worker lets others have: KV of its pool under leases, described by tickets.

What a prefill worker hands over is digested while the next chunk is computed, not between the last one and the ticket.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from python_backends.core.block_hash import content_hash
from python_backends.core.handoff import TICKET_VERSION, KVHandoff
from python_backends.core.types import BlockHash, Epoch, RequestId, WorkerId
from python_backends.engines.base import EngineInfo
from python_backends.engines.paged.sequence import Sequence
from python_backends.kv.block_pool import BlockPool
from python_backends.kv.lease import LeaseTable
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer.base import KVTransport


class Publisher:
    """Belongs to the engine's thread. leases: on blocks that are published."""

    def __init__(
        self,
        worker: WorkerId,
        epoch: Epoch,
        info: EngineInfo,
        pool: BlockPool,
        memory: PoolMemory,
        transport: KVTransport,
        export: Callable[[Many[int]], None],
        lease_s: float,
        *,
        call: Callable[[Callable[[], None]], None],
        ahead: bool,
    ) -> None:
        """export: ModelRunner.export_blocks. lease_s: transfer.lease_s. call: has the engine's thread do something.

        ahead: digest blocks as soon as they are full, on a thread for it.
        """
        self.leases = LeaseTable(pool, on_end=transport.release)
        self._worker = worker
        self._epoch = epoch
        self._info = info
        self._pool = pool
        self._memory = memory
        self._transport = transport
        self._export = export
        self._lease_s = lease_s
        self._call = call
        self._digester = ThreadPoolExecutor(1, thread_name_prefix="digest") if ahead else None

    def publish(self, sequence: Sequence) -> KVHandoff:
        """Put the given tokens' KV under a lease and describe it. The lease takes over a reference of each block."""
        size = sequence.block_size
        blocks = sequence.blocks[: self._info.layout.blocks_for(sequence.num_given)]
        self._pool.retain(blocks)
        given = sequence.token_ids[: sequence.num_given]
        content = content_hash(given, sequence.hashes[: sequence.num_given // size], size, sequence.root)
        return self._describe(sequence.id, blocks, sequence.num_given, content)

    def lend(self, request_id: RequestId, hashes: Many[BlockHash]) -> KVHandoff | None:
        """The first of these blocks, as far as they are cached; None: the first is not."""
        count = self._pool.match(hashes)
        if count == 0:
            return None
        blocks = self._pool.reuse(hashes[:count])
        # A block's hash stands for all tokens up to its end.
        return self._describe(request_id, blocks, count * self._info.layout.block_size, hashes[count - 1])

    def stored(self, hashes: Many[BlockHash]) -> None:
        """Blocks that have become findable."""
        if self._digester is None:
            return
        found = [(hash_, self._pool.find(hash_)) for hash_ in hashes]
        blocks = [(hash_, block) for hash_, block in found if block is not None and self._pool.digest_of(block) is None]
        if not self._transport.on_device:
            self._export([block for _, block in blocks])
        generations = self._memory.generations
        self._digester.submit(self._make_digests, [(hash_, block, int(generations[block])) for hash_, block in blocks])

    def close(self) -> None:
        """Of its thread; any thread may call it. The leases are closed by the engine's."""
        if self._digester is not None:
            self._digester.shutdown(wait=True, cancel_futures=True)

    def _describe(self, request_id: RequestId, blocks: list[int], num_tokens: int, content: BlockHash) -> KVHandoff:
        """The ticket for blocks that hold so many tokens; a new lease takes over one reference of each."""
        size = self._info.layout.block_size
        if not self._transport.on_device:  # a block with a digest is in the pool memory already
            self._export([block for block in blocks if self._pool.digest_of(block) is None])
        lease_id = self.leases.grant(request_id, blocks, self._lease_s)
        published = self._transport.publish(self._memory, blocks, lease_id)
        return KVHandoff(
            version=TICKET_VERSION,
            transport=self._transport.name,
            source=self._worker,
            epoch=self._epoch,
            lease_id=lease_id,
            expires_at=time.time() + self._lease_s,
            layout=self._info.layout,
            fingerprint=self._info.fingerprint,
            num_tokens=num_tokens,
            blocks=blocks,
            generations=[int(self._memory.generations[block]) for block in blocks],
            digests=self._digests(blocks, num_full=num_tokens // size),
            locator=published.locator,
            opaque=published.opaque,
            content=content,
        )

    def _digests(self, blocks: list[int], num_full: int) -> list[bytes]:
        """Those of full blocks, the first ones, are kept: a prefix that is handed over often is digested once."""
        known = {block: digest for block in blocks[:num_full] if (digest := self._pool.digest_of(block)) is not None}
        unknown = [block for block in blocks if block not in known]
        made = dict(zip(unknown, self._transport.digests(self._memory, unknown), strict=True))
        for block in blocks[:num_full]:
            if block in made:
                self._pool.set_digest(block, made[block])
        return [known[block] if block in known else made[block] for block in blocks]

    def _make_digests(self, blocks: list[tuple[BlockHash, int, int]]) -> None:
        """On the digesting thread."""
        digests = self._transport.digests(self._memory, [block for _, block, _ in blocks])
        made = [(*block, digest) for block, digest in zip(blocks, digests, strict=True)]
        self._call(partial(self._take_digests, made))

    def _take_digests(self, made: list[tuple[BlockHash, int, int, bytes]]) -> None:
        """Keep those of blocks that nobody has reused since."""
        generations = self._memory.generations
        for hash_, block, generation, digest in made:
            if self._pool.find(hash_) == block and generations[block] == generation:
                self._pool.set_digest(block, digest)
