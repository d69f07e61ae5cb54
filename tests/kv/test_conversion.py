"""Handoffs whose layout is not the reader's: what is defined arrives as the same numbers, the rest is refused by name."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from python_backends.core.errors import ConfigError, HandoffRefused, RefusalReason
from python_backends.core.handoff import KVHandoff
from python_backends.core.layout import KVLayout
from python_backends.core.types import Epoch
from python_backends.kv.memory import PoolMemory
from python_backends.kv.transfer import conversion
from python_backends.kv.transfer.base import CheckedTransport, Fetched
from python_backends.kv.transfer.inline import InlineTransport
from python_backends.kv.transfer.shm import ShmTransport
from tests.kv.kv_blocks import Blocks, numbers_of, pack, unpack
from tests.kv.test_transports import nixl, publish, soon, tcp

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=16, dtype="float32", keys="columns")
DTYPES = ("float32", "float16", "int8")


def layout(block_size: int = 16, dtype: str = "float32", keys: str = "columns") -> KVLayout:
    return msgspec.structs.replace(LAYOUT, block_size=block_size, dtype=dtype, keys=keys)


class Ends:
    """A source with some tokens' KV in its own layout, and a reader with another one."""

    def __init__(self, transport: CheckedTransport, source: KVLayout, target: KVLayout, tokens: int) -> None:
        self.transport = transport
        self.layout = target
        packed = pack(numbers_of(source, tokens), source)
        self.numbers = unpack(packed, source, tokens)
        self.source = PoolMemory(len(packed) + 3, source.block_bytes, Epoch(1))
        blocks = np.random.default_rng(1).permutation(len(packed) + 3)[: len(packed)].tolist()
        self.source.blocks[blocks] = packed
        self.target = PoolMemory(target.blocks_for(tokens) + 2, target.block_bytes, Epoch(2))
        self.target.blocks[:] = 255
        handoff = publish(transport, self.source, blocks)
        self.handoff: KVHandoff = msgspec.structs.replace(handoff, layout=source, num_tokens=tokens)

    def fetch(self, first_block: int = 0) -> tuple[Fetched, Blocks]:
        """How, and the blocks of the prompt from that one on."""
        count = self.layout.blocks_for(self.handoff.num_tokens) - first_block
        blocks = list(range(count, 0, -1))
        first = first_block * self.layout.block_size
        how = conversion.fetch_converted(self.transport, self.handoff, first, self.layout, self.target, blocks, soon())
        return how, self.target.blocks[blocks]

    def close(self) -> None:
        self.transport.close()
        self.source.close()
        self.target.close()


@pytest.fixture(params=[ShmTransport, InlineTransport, tcp, nixl])
def transport(request: pytest.FixtureRequest) -> Iterator[CheckedTransport]:
    made: CheckedTransport = request.param()
    yield made
    made.close()


@pytest.mark.parametrize(("theirs", "ours"), [(16, 32), (32, 16), (16, 64), (32, 48)])
@pytest.mark.parametrize("tokens", [32, 77])
def test_other_block_sizes_arrive_bit_for_bit(transport: CheckedTransport, theirs: int, ours: int, tokens: int) -> None:
    ends = Ends(transport, layout(theirs), layout(ours), tokens)
    how, blocks = ends.fetch()
    assert np.array_equal(unpack(blocks, ends.layout, tokens), ends.numbers)
    assert (how.transport, how.rounded) == (transport.name, "")
    assert how.wire_bytes == len(ends.handoff.blocks) * ends.handoff.layout.block_bytes
    ends.close()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["rows", "columns"]),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 200),
    st.integers(0, 3),
    st.sampled_from([1, 4096, 1 << 20]),
)
def test_any_pair_of_layouts(
    keys: str, theirs: str, ours: str, their_size: int, our_size: int, tokens: int, cached: int, piece: int
) -> None:
    """Also from the middle on, where the first blocks are cached, and in pieces of any length."""
    unit = 16 if keys == "columns" else 3
    ends = Ends(ShmTransport(), layout(their_size * unit, theirs, keys), layout(our_size * unit, ours, keys), tokens)
    first = min(cached, (tokens - 1) // ends.layout.block_size)
    before = conversion._PIECE_BYTES
    conversion._PIECE_BYTES = piece
    try:
        how, blocks = ends.fetch(first)
    finally:
        conversion._PIECE_BYTES = before
    skipped = first * ends.layout.block_size
    expected = ends.numbers[:, :, :, skipped:]
    if theirs != ours:
        expected = unpack(pack(expected, ends.layout), ends.layout, tokens - skipped)
    assert np.array_equal(unpack(blocks, ends.layout, tokens - skipped), expected)
    assert how.rounded == ("" if theirs == ours else "int8" if "int8" in (theirs, ours) else "float16")
    untouched = [block for block in range(ends.target.num_blocks) if not 1 <= block <= len(blocks)]
    assert (ends.target.blocks[untouched] == 255).all()
    ends.close()


def test_damage_is_found_before_anything_is_converted(transport: CheckedTransport) -> None:
    if transport.name == "inline":
        pytest.skip("the ticket holds a copy")
    ends = Ends(transport, layout(16), layout(32), 64)
    ends.source.blocks[ends.handoff.blocks[2], 5] ^= 1
    with pytest.raises(HandoffRefused) as refused:
        ends.fetch()
    assert refused.value.reason is RefusalReason.DIGEST_MISMATCH
    ends.close()


def test_no_memory_to_convert_in_is_a_failed_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends(ShmTransport(), layout(16), layout(32), 64)
    monkeypatch.setattr(conversion, "PoolMemory", _no_memory)
    with pytest.raises(HandoffRefused, match="no memory to convert") as refused:
        ends.fetch()
    assert refused.value.reason is RefusalReason.TRANSFER_FAILED
    ends.close()


def _no_memory(*_: object) -> PoolMemory:
    raise ConfigError("there is none")
