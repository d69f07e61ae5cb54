"""Fetching KV of another layout than the pool's: blocks of another size, numbers of another dtype.

They come into memory of their own, as the source has them and verified as always, by whatever transport; from there they
are converted into the pool, a piece at a time. Which layouts become which says KVLayout.obstacle.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from python_backends.core.errors import ConfigError
from python_backends.core.handoff import KVHandoff
from python_backends.core.layout import KVLayout
from python_backends.core.types import Epoch
from python_backends.kv.cast import Cast
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer.base import Fetched, KVTransport, check_time, failed

_PIECE_BYTES = 32 << 20  # held beside the pool
_SCALE_BYTES = 4
_COARSENESS = ("", "float16", "int8")  # what `Fetched.rounded` may be

Blocks = npt.NDArray[np.uint8]


def fetch_converted(
    transport: KVTransport,
    handoff: KVHandoff,
    first_token: int,
    layout: KVLayout,
    into: PoolMemory,
    blocks: Sequence[int],
    deadline: float,
    *,
    exact: bool = True,
) -> Fetched:
    """Bring the handoff's tokens from `first_token` on into `into.blocks[blocks[i]]`, in `layout`, the pool's.

    `first_token` is where the first of `blocks` begins. Otherwise as KVTransport.fetch; `exact` is about the way, not about
    the conversion.
    """
    theirs = handoff.layout
    wanted = range(first_token // theirs.block_size, len(handoff.blocks))
    size = max(1, min(len(wanted), _PIECE_BYTES // theirs.block_bytes))
    try:
        landing = PoolMemory(size, theirs.block_bytes, Epoch(0))
    except ConfigError as error:
        raise failed(f"no memory to convert KV in: {error}") from error
    try:
        convert = _Conversion(theirs, layout)
        if (handoff.num_tokens - first_token) % layout.block_size:
            into.blocks[blocks[-1]] = 0  # what the source's blocks do not cover
        pieces = []
        for start in range(wanted.start, wanted.stop, size):
            piece = range(start, min(start + size, wanted.stop))
            pieces.append(transport.fetch(handoff, piece, landing, range(len(piece)), deadline, exact=exact))
            for place, position in enumerate(piece):
                check_time(deadline)
                convert(landing.blocks[place], position * theirs.block_size - first_token, into, blocks)
    finally:
        landing.close()
    rounded = [piece.rounded for piece in pieces] + [_rounding(theirs, layout)]
    return msgspec.structs.replace(
        pieces[-1], wire_bytes=sum(piece.wire_bytes for piece in pieces), rounded=max(rounded, key=_COARSENESS.index)
    )


def _rounding(theirs: KVLayout, ours: KVLayout) -> str:
    """The coarser dtype of two that differ: the numbers are as precise as that."""
    if theirs.dtype == ours.dtype:
        return ""
    return max((dtype for dtype in (theirs.dtype, ours.dtype) if dtype in _COARSENESS), key=_COARSENESS.index)


class _Conversion:
    """One block at a time: first its numbers, then where they belong."""

    def __init__(self, source: KVLayout, target: KVLayout) -> None:
        cast = msgspec.structs.replace(source, dtype=target.dtype)
        self._cast = Cast(source, cast) if source.dtype != target.dtype else None
        self._block: Blocks = np.empty(cast.block_bytes, np.uint8)
        self._source = cast
        self._target = target

    def __call__(self, block: Blocks, token: int, into: PoolMemory, blocks: Sequence[int]) -> None:
        """Put a source's block to where its tokens are. `token`: its first one, counted from the first of `blocks`; those
        before that are left out."""
        if self._cast is not None:
            self._cast(block, self._block)
            block = self._block
        ours, theirs = self._target.block_size, self._source.block_size
        at = max(token, 0)
        end = min(token + theirs, len(blocks) * ours)
        while at < end:
            index, slot = divmod(at, ours)
            count = min(ours - slot, end - at)
            _move(self._source, block, at - token, self._target, into.blocks[blocks[index]], slot, count)
            at += count


def _move(source: KVLayout, block: Blocks, slot: int, target: KVLayout, into: Blocks, place: int, count: int) -> None:
    """`count` tokens from `slot` of a block to `place` of another one, of all layers and heads.

    Columns of keys are made of sixteen tokens, and slots, places and counts are multiples of that.
    """
    width = source.vector_bytes - (_SCALE_BYTES if source.dtype == "int8" else 0)
    heads = source.num_layers * 2 * source.num_kv_heads
    ours, theirs = into.reshape(heads, -1), block.reshape(heads, -1)
    ours[:, place * width : (place + count) * width] = theirs[:, slot * width : (slot + count) * width]
    if source.dtype == "int8":
        first, start = target.block_size * width, source.block_size * width
        begin, end = first + place * _SCALE_BYTES, first + (place + count) * _SCALE_BYTES
        ours[:, begin:end] = theirs[:, start + slot * _SCALE_BYTES : start + (slot + count) * _SCALE_BYTES]
