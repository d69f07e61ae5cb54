"""The lossless codec of KV on the wire: of each number only the highest byte is compressed, the others travel as they are.

The highest byte of a float holds its sign and most of its exponent, which are much alike in KV; the lower bytes are noise
that no compressor makes smaller, so they are only set apart (the byte shuffle of HDF5 and Blosc). An encoded block is

    4 bytes   length of the compressed bytes, little-endian; _AS_IT_IS: the block follows unchanged
    n bytes   one zstd frame: the highest bytes, in order
    rest      the lower bytes, plane by plane, their length known from the layout

so it is never longer than the block and these four bytes, and what is to be decompressed is known beforehand. The digests of
the ticket are of the decoded block: they protect what arrives, whatever happened to it on the way.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import zstandard

from python_backends.core.layout import DTYPE_BYTES

LENGTH = struct.Struct("<I")
_AS_IT_IS = 0xFFFF_FFFF
_LEVEL = 1  # higher ones are slower and find nothing more: there are no repetitions, only unequal frequencies

Bytes = npt.NDArray[np.uint8]


class BadEncoding(Exception):
    """Not what the codec makes of a block."""


class PlaneCodec:
    """Encodes and decodes blocks of one layout. Used by one thread at a time; compressing lets go of the GIL."""

    def __init__(self, dtype: str, block_bytes: int) -> None:
        """`dtype`: of KVLayout. A block whose length is no multiple of it counts as bytes."""
        width = DTYPE_BYTES.get(dtype, 1)
        self._width = 1 if block_bytes % width else width
        self._block_bytes = block_bytes
        self._count = block_bytes // self._width  # numbers
        self._high = np.empty(self._count, np.uint8)
        self._low = np.empty(block_bytes - self._count, np.uint8)
        self._frame = np.empty(self._count, np.uint8)
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, block: Bytes) -> list[memoryview]:
        """`block`: uint8 [block_bytes]. Pieces to be sent one after the other, good until the next call."""
        self._high[:] = block[self._width - 1 :: self._width]
        frame = self._compressor.compress(self._high.data)
        if len(frame) >= self._count:
            return [memoryview(LENGTH.pack(_AS_IT_IS)), block.data]
        for ours, theirs in self._lower_planes(block):
            ours[:] = theirs
        return [memoryview(LENGTH.pack(len(frame))), memoryview(frame), self._low.data]

    def landing(self, length: int, block: Bytes) -> Sequence[memoryview]:
        """Where what follows a length belongs; `block` is where the numbers go in the end. Raises BadEncoding."""
        if length == _AS_IT_IS:
            return [block.data]
        if length >= self._count:
            raise BadEncoding(f"{length} compressed bytes for {self._count}")
        return [self._frame[:length].data, self._low.data]

    def decode(self, length: int, block: Bytes) -> None:
        """Fill `block` from what has come into the landing. Raises BadEncoding."""
        if length == _AS_IT_IS:
            return
        frame = self._frame[:length].data
        try:
            told = zstandard.get_frame_parameters(frame).content_size  # it would be allocated unseen
            if told != self._count:
                raise BadEncoding(f"it would be {told} bytes instead of {self._count}")
            high = self._decompressor.decompress(frame, max_output_size=self._count, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise BadEncoding(str(error)) from error
        if len(high) != self._count:
            raise BadEncoding(f"it is {len(high)} bytes instead of {self._count}")
        block[self._width - 1 :: self._width] = np.frombuffer(high, np.uint8)
        for ours, theirs in self._lower_planes(block):
            theirs[:] = ours

    def _lower_planes(self, block: Bytes) -> list[tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]]:
        """Pairs of views: a plane in `_low`, and where its bytes lie in the block."""
        count = self._count
        if self._width == 1:
            return []
        if self._width == 2:
            return [(self._low, block[0::2])]
        # Two bytes at once, which numpy copies twice as fast.
        return [(self._low[: 2 * count].view(np.uint16), block.view(np.uint16)[0::2]), (self._low[2 * count :], block[2::4])]
