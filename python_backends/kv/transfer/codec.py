"""How blocks look on the wire in the codecs of `transfer.codec`: lossless, and rounded where `transfer.rounding` allows it.

Lossless: of each number only the highest byte is compressed, the others travel as they are. The highest byte of a float holds
its sign and most of its exponent, which are much alike in KV; the lower bytes are noise that no compressor makes smaller, so
they are only set apart (the byte shuffle of HDF5 and Blosc). An encoded block is

    4 bytes   length of the compressed bytes, little-endian; _AS_IT_IS: the block follows unchanged
    n bytes   one zstd frame: the highest bytes, in order
    rest      the lower bytes, plane by plane, their length known from the layout

so it is never longer than the block and these four bytes, and what is to be decompressed is known beforehand. The digests of
the ticket are of the decoded block: they protect what arrives, whatever happened to it on the way.

Rounded (float16, int8): the block as a pool of that dtype would have it, which the reader makes wide again.

    4 bytes   length of what follows but the seal, little-endian; _AS_IT_IS: the block follows unchanged, without a seal
    n bytes   the block, rounded
    32 bytes  seal: HMAC with the deployment's key over codec, digest of the exact block, xxh3_128 of the n bytes

The ticket's digests can't protect what was rounded. So the source takes a copy of the block, sees that it is the one of the
ticket's digest, rounds the copy, and seals what it sends: these bytes are what becomes of that block. The reader believes
nothing else. A block that loses too much by rounding (_MOST_ERROR), or is not what was published any more, is sent as it
is, and looked at by the reader as every exact one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hmac import compare_digest
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from python_backends.core.layout import DTYPE_BYTES, ROUNDINGS, KVLayout
from python_backends.core.signing import MAC_BYTES, Domain, mac
from python_backends.kv.cast import Cast

LENGTH = struct.Struct("<I")
_AS_IT_IS = 0xFFFF_FFFF
_LEVEL = 1  # higher ones are slower and find nothing more: there are no repetitions, only unequal frequencies

_FLOATS = {"float32": np.float32, "float16": np.float16}
_MOST_ERROR = {"float16": 0.001, "int8": 0.04}  # that a head's keys or values may lose: the mean magnitude, of theirs

Bytes = npt.NDArray[np.uint8]


class BadEncoding(Exception):
    """Not what the codec makes of a block."""


class BlockCodec(Protocol):
    """Encodes and decodes blocks of one layout. Used by one thread at a time.

    `digest`: of the exact block, as the ticket has it.
    """

    def encode(self, block: Bytes, digest: bytes) -> list[memoryview]:
        """`block`: uint8 [block_bytes]. Pieces to be sent one after the other, good until the next call."""

    def landing(self, length: int, block: Bytes) -> Sequence[memoryview]:
        """Where what follows a length belongs; `block` is where the numbers go in the end. Raises BadEncoding."""

    def decode(self, length: int, block: Bytes, digest: bytes) -> bool:
        """Fill `block` from what has come into the landing. Raises BadEncoding.

        Returns whether it was rounded; else it is to be the exact block, which its digest tells.
        """


def roundings(dtype: str, rounding: str) -> tuple[str, ...]:
    """What KV of a dtype may be rounded to on its way, with this `transfer.rounding`."""
    most = ROUNDINGS[1 : ROUNDINGS.index(rounding) + 1]
    return tuple(name for name in most if dtype in ("float32", "float16") and DTYPE_BYTES[name] < DTYPE_BYTES[dtype])


def create_codec(name: str, layout: KVLayout, key: bytes) -> BlockCodec:
    """`name`: lossless, or one of `roundings`. `key` is the deployment's."""
    return PlaneCodec(layout.dtype, layout.block_bytes) if name == "lossless" else RoundingCodec(layout, name, key)


class PlaneCodec:
    """The lossless codec: a BlockCodec that never looks at the digest. Compressing lets go of the GIL."""

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

    def encode(self, block: Bytes, digest: bytes = b"") -> list[memoryview]:
        """See BlockCodec."""
        self._high[:] = block[self._width - 1 :: self._width]
        frame = self._compressor.compress(self._high.data)
        if len(frame) >= self._count:
            return [memoryview(LENGTH.pack(_AS_IT_IS)), block.data]
        for ours, theirs in self._lower_planes(block):
            ours[:] = theirs
        return [memoryview(LENGTH.pack(len(frame))), memoryview(frame), self._low.data]

    def landing(self, length: int, block: Bytes) -> Sequence[memoryview]:
        """See BlockCodec."""
        if length == _AS_IT_IS:
            return [block.data]
        if length >= self._count:
            raise BadEncoding(f"{length} compressed bytes for {self._count}")
        return [self._frame[:length].data, self._low.data]

    def decode(self, length: int, block: Bytes, digest: bytes = b"") -> bool:
        """See BlockCodec."""
        if length == _AS_IT_IS:
            return False
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
        return False

    def _lower_planes(self, block: Bytes) -> list[tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]]:
        """Pairs of views: a plane in `_low`, and where its bytes lie in the block."""
        count = self._count
        if self._width == 1:
            return []
        if self._width == 2:
            return [(self._low, block[0::2])]
        # Two bytes at once, which numpy copies twice as fast.
        return [(self._low[: 2 * count].view(np.uint16), block.view(np.uint16)[0::2]), (self._low[2 * count :], block[2::4])]


class RoundingCodec:
    """Blocks travel as a pool of a narrower dtype would have them."""

    def __init__(self, layout: KVLayout, dtype: str, key: bytes) -> None:
        """`dtype`: one of roundings(layout.dtype, ...)."""
        narrow = msgspec.structs.replace(layout, dtype=dtype)
        self._round = Cast(layout, narrow)
        self._widen = Cast(narrow, layout)
        self._dtype = dtype
        self._wide = _FLOATS[layout.dtype]
        self._heads = layout.num_layers * 2 * layout.num_kv_heads
        self._key = key
        self._copy = np.empty(layout.block_bytes, np.uint8)
        self._again = np.empty(layout.block_bytes, np.uint8)  # the copy, rounded and wide again
        self._narrow = np.empty(narrow.block_bytes, np.uint8)
        self._seal = np.empty(MAC_BYTES, np.uint8)

    def encode(self, block: Bytes, digest: bytes) -> list[memoryview]:
        """See BlockCodec."""
        self._copy[:] = block
        published = xxhash.xxh3_128_digest(self._copy.data) == digest
        if not published or not self._rounds_well():
            return [memoryview(LENGTH.pack(_AS_IT_IS)), self._copy.data]
        return [memoryview(LENGTH.pack(len(self._narrow))), self._narrow.data, memoryview(self._sealed(digest))]

    def landing(self, length: int, block: Bytes) -> Sequence[memoryview]:
        """See BlockCodec."""
        if length == _AS_IT_IS:
            return [block.data]
        if length != len(self._narrow):
            raise BadEncoding(f"{length} rounded bytes instead of {len(self._narrow)}")
        return [self._narrow.data, self._seal.data]

    def decode(self, length: int, block: Bytes, digest: bytes) -> bool:
        """See BlockCodec."""
        if length == _AS_IT_IS:
            return False
        if not compare_digest(self._seal.tobytes(), self._sealed(digest)):
            raise BadEncoding("the seal is not the source's")
        self._widen(self._narrow, block)
        return True

    def _rounds_well(self) -> bool:
        """Round the copy, and see how much each head's keys, and values, have lost. A number that is infinite is too much."""
        self._round(self._copy, self._narrow)
        self._widen(self._narrow, self._again)
        with np.errstate(invalid="ignore", over="ignore"):
            exact = self._copy.view(self._wide).astype(np.float32, copy=False).reshape(self._heads, -1)
            lost = self._again.view(self._wide).reshape(self._heads, -1) - exact
            # Sums of magnitudes, not of squares: there one number that is far larger than the others would hide them.
            most = _MOST_ERROR[self._dtype] * np.abs(exact).sum(axis=1)
            return bool(np.all(np.abs(lost, out=lost).sum(axis=1) <= most))

    def _sealed(self, digest: bytes) -> bytes:
        body = digest + xxhash.xxh3_128_digest(self._narrow.data) + self._dtype.encode()
        return mac(Domain.ROUNDED_KV, body, self._key)
