"""The codecs: what comes out is what went in, rounded only where that may be, or one clear error; and when they are used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from python_backends.core.errors import HandoffRefused, RefusalReason
from python_backends.core.layout import KVLayout
from python_backends.kv.transfer.base import Fetched, block_digest
from python_backends.kv.transfer.codec import LENGTH, BadEncoding, PlaneCodec, RoundingCodec, roundings
from python_backends.kv.transfer.codec_choice import CodecChoice, Moved
from python_backends.kv.transfer.server import TransferServer
from python_backends.kv.transfer.session import Session
from python_backends.kv.transfer.tcp import TcpTransport
from tests.kv.kv_blocks import numbers_of, pack, unpack
from tests.kv.test_transports import KEY, LAYOUT, Rig, soon, tcp

Bytes = npt.NDArray[np.uint8]
DTYPES = ["float32", "bfloat16", "float16", "int8", "fp8"]
SOURCE = "10.0.0.1:7100"
MIB = 1 << 20


def likely(count: int) -> Bytes:
    """Numbers as KV has them: float32, near zero. uint8 [4 * count]."""
    return np.random.default_rng(1).normal(size=count).astype(np.float32).view(np.uint8)


def encode(dtype: str, block: Bytes) -> bytes:
    return b"".join(PlaneCodec(dtype, len(block)).encode(block))


def decode(dtype: str, data: bytes, block_bytes: int) -> Bytes:
    """As the reader does it. The data must not be longer than a block can be."""
    codec, block = PlaneCodec(dtype, block_bytes), np.zeros(block_bytes, np.uint8)
    (length,) = LENGTH.unpack_from(data)
    at = LENGTH.size
    for piece in codec.landing(length, block):
        piece[:] = data[at : at + len(piece)]
        at += len(piece)
    assert at == len(data)
    codec.decode(length, block)
    return block


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.binary(min_size=1, max_size=300), st.integers(1, 40))
def test_any_block_comes_back_and_is_never_longer_than_a_length_more(dtype: str, data: bytes, times: int) -> None:
    block = np.frombuffer(data * times, np.uint8)
    encoded = encode(dtype, block)
    assert len(encoded) <= len(block) + LENGTH.size
    assert np.array_equal(decode(dtype, encoded, len(block)), block)


def test_numbers_as_in_kv_become_fewer_bytes() -> None:
    block = likely(4096)
    assert len(encode("float32", block)) < 0.9 * len(block)
    halves = block.view(np.float32).astype(np.float16).view(np.uint8)
    assert len(encode("float16", halves)) < 0.9 * len(halves)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 255))
def test_a_damaged_frame_is_an_error_or_other_numbers_and_never_more_of_them(where: int, change: int) -> None:
    """What is not an error here, the digests of the ticket find."""
    block = likely(256)
    data = bytearray(encode("float32", block))
    (length,) = LENGTH.unpack_from(data)
    data[LENGTH.size + where % length] ^= change
    with contextlib.suppress(BadEncoding):
        assert len(decode("float32", bytes(data), len(block))) == len(block)


@pytest.mark.parametrize("size", [0, 1, 255, 257, 1 << 30])
def test_a_frame_of_another_size_is_refused_before_it_is_unpacked(size: int) -> None:
    if size > MIB:  # announces a GiB
        frame = bytearray(zstandard.ZstdCompressor(write_content_size=True).compress(bytes(MIB)))
        at = frame.index(MIB.to_bytes(4, "little"))
        frame[at : at + 4] = size.to_bytes(4, "little")
    else:
        frame = bytearray(zstandard.compress(bytes(size)))
    with pytest.raises(BadEncoding, match="instead of 256"):
        decode("float32", LENGTH.pack(len(frame)) + bytes(frame) + bytes(768), 1024)


@pytest.mark.parametrize("frame", [b"", b"x", bytes(100), zstandard.compress(bytes(256)) + b"x"])
def test_what_is_no_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(BadEncoding):
        decode("float32", LENGTH.pack(len(frame)) + frame + bytes(768), 1024)


@pytest.mark.parametrize("length", [256, 257, 0x7FFF_FFFF, 0xFFFF_FFFE])
def test_a_length_that_no_encoder_makes_is_refused_before_anything_is_read(length: int) -> None:
    with pytest.raises(BadEncoding, match="compressed bytes for 256"):
        PlaneCodec("float32", 1024).landing(length, np.zeros(1024, np.uint8))


# --- on the wire ------------------------------------------------------------------------------------------------------


class OldSession(Session):
    """Of the version before there were codecs."""

    versions = (1, 1)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(tcp(codec="lossless"))
    rig.source.blocks[:] = likely(rig.source.blocks.size // 4).reshape(rig.source.blocks.shape)
    yield rig
    rig.close()


def fetch(rig: Rig) -> Fetched:
    blocks = [3, 8, 1, 20]
    how = rig.transport.fetch(rig.publish(blocks), range(4), rig.target, range(4), soon())
    assert np.array_equal(rig.target.blocks[:4], rig.source.blocks[blocks])
    return how


def test_fewer_bytes_travel_and_are_counted(rig: Rig) -> None:
    how = fetch(rig)
    assert how.codec == "lossless"
    assert 0 < how.wire_bytes < 4 * LAYOUT.block_bytes


@pytest.mark.parametrize("end", ["server", "tcp"])
def test_an_older_peer_gets_and_gives_the_bytes_as_they_are(rig: Rig, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"python_backends.kv.transfer.{end}.Session", OldSession)
    assert fetch(rig) == Fetched("tcp", codec="raw", wire_bytes=4 * LAYOUT.block_bytes)


def test_a_source_that_does_not_encode_says_so() -> None:
    server = TransferServer("127.0.0.1", (), KEY, None, 5.0, codecs=())
    rig = Rig(TcpTransport(server, KEY, None, 2, "lossless"))
    assert fetch(rig).codec == "raw"
    rig.close()


def _longer(pieces: list[memoryview]) -> list[memoryview]:
    return [memoryview(LENGTH.pack(1 << 30)), *pieces[1:]]


def _no_frame(pieces: list[memoryview]) -> list[memoryview]:
    return [pieces[0], memoryview(bytes(len(pieces[1]))), *pieces[2:]]


def _another_plane(pieces: list[memoryview]) -> list[memoryview]:
    return [*pieces[:2], memoryview(bytes(len(pieces[2])))]


@pytest.mark.parametrize("damage", [_longer, _no_frame, _another_plane])
def test_damage_on_the_way_is_one_clear_error(rig: Rig, damage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_well = PlaneCodec.encode
    monkeypatch.setattr(PlaneCodec, "encode", lambda codec, block, digest: damage(encode_well(codec, block)))
    with pytest.raises(HandoffRefused, match="block 0 of prefill arrived damaged") as refused:
        fetch(rig)
    assert refused.value.reason is RefusalReason.DIGEST_MISMATCH
    monkeypatch.undo()
    assert fetch(rig).codec == "lossless"


def test_a_block_reused_while_it_is_encoded_is_stale(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_well = PlaneCodec.encode

    def encode_late(codec: PlaneCodec, block: Bytes, digest: bytes) -> list[memoryview]:
        rig.source.generations[8] += np.uint64(1)
        return encode_well(codec, block)

    monkeypatch.setattr(PlaneCodec, "encode", encode_late)
    assert rig.refusal(rig.publish([3, 8])) is RefusalReason.STALE_EPOCH


# --- rounding ---------------------------------------------------------------------------------------------------------


def rounding_rig(codec: str, rounding: str = "int8", source: Sequence[str] = ("lossless", "float16", "int8")) -> Rig:
    """Blocks of float32 as a model has them."""
    server = TransferServer("127.0.0.1", (), KEY, None, 5.0, codecs=source)
    rig = Rig(TcpTransport(server, KEY, None, 2, codec, rounding), exact=False)
    count = rig.source.num_blocks
    rig.source.blocks[:] = pack(numbers_of(LAYOUT, count * LAYOUT.block_size), LAYOUT)
    return rig


def lost(rig: Rig, blocks: list[int]) -> float:
    """The largest difference between the first blocks here and the source's."""
    tokens = len(blocks) * LAYOUT.block_size
    exact = unpack(rig.source.blocks[blocks], LAYOUT, tokens)
    return float(np.abs(unpack(rig.target.blocks[: len(blocks)], LAYOUT, tokens) - exact).max())


@pytest.mark.parametrize(("codec", "most", "size"), [("float16", 0.002, 0.55), ("int8", 0.015, 0.45)])
def test_what_may_be_rounded_arrives_nearly_as_it_was(codec: str, most: float, size: float) -> None:
    rig = rounding_rig(codec)
    how = rig.fetch(rig.publish([3, 8, 1]), range(3), range(3))
    assert (how.codec, how.rounded) == (codec, codec)
    assert how.wire_bytes < size * 3 * LAYOUT.block_bytes
    assert 0 < lost(rig, [3, 8, 1]) < most
    rig.close()


def test_nothing_is_rounded_for_a_reader_that_wants_it_exact() -> None:
    rig = rounding_rig("float16")
    handoff = rig.publish([3, 8])
    how = rig.transport.fetch(handoff, range(2), rig.target, range(2), soon())
    assert (how.codec, how.rounded, lost(rig, [3, 8])) == ("raw", "", 0.0)
    rig.close()


@pytest.mark.parametrize(
    ("rounding", "source"), [("none", ("lossless", "float16")), ("float16", ("lossless",)), ("float16", ())]
)
def test_nothing_is_rounded_unless_both_ends_allow_it(rounding: str, source: tuple[str, ...]) -> None:
    rig = rounding_rig("float16", rounding, source)
    how = rig.fetch(rig.publish([3, 8]), range(2), range(2))
    assert (how.codec, how.rounded, lost(rig, [3, 8])) == ("raw", "", 0.0)
    rig.close()


def test_what_a_dtype_may_be_rounded_to() -> None:
    assert roundings("float32", "int8") == ("float16", "int8")
    assert roundings("float32", "float16") == ("float16",)
    assert roundings("float16", "int8") == ("int8",)
    for dtype, rounding in (("float32", "none"), ("int8", "int8"), ("bfloat16", "int8"), ("float16", "float16")):
        assert roundings(dtype, rounding) == ()


@pytest.mark.parametrize("bad", [70_000.0, np.inf, np.nan])
def test_a_block_that_would_lose_too_much_is_sent_as_it_is(bad: float) -> None:
    rig = rounding_rig("float16")
    rig.source.blocks[8].view(np.float32)[5] = bad
    how = rig.fetch(rig.publish([3, 8]), range(2), range(2))
    assert how.rounded == "float16"
    assert np.array_equal(rig.target.blocks[1], rig.source.blocks[8])
    assert not np.array_equal(rig.target.blocks[0], rig.source.blocks[3])
    rig.close()


def test_int8_is_not_for_heads_with_one_number_far_larger_than_the_others() -> None:
    """A scale that fits it leaves too little of the others."""
    layout = KVLayout(num_layers=1, num_kv_heads=2, head_dim=64, block_size=4, dtype="float32")
    codec = RoundingCodec(layout, "int8", KEY)
    (block,) = pack(numbers_of(layout, 4), layout)
    assert len(codec.encode(block, block_digest(block))) == 3
    block.view(np.float32).reshape(4, 4, 64)[2, :, 7] = 10.0
    assert len(codec.encode(block, block_digest(block))) == 3
    block.view(np.float32).reshape(4, 4, 64)[2, :, 7] = 100.0
    _, exact = codec.encode(block, block_digest(block))
    assert np.array_equal(np.asarray(exact), block)


@pytest.mark.parametrize("what", ["numbers", "seal", "another block", "another codec", "another key"])
def test_rounded_blocks_that_the_source_did_not_seal_are_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rounding_rig("float16")
    encode_well = RoundingCodec.encode
    sent: list[list[bytes]] = []

    def encode_badly(codec: RoundingCodec, block: Bytes, digest: bytes) -> list[memoryview]:
        if what == "another codec":
            codec._dtype = "int8"
        if what == "another key":
            codec._key = b"s" * 32
        length, numbers, seal = (bytearray(piece) for piece in encode_well(codec, block, digest))
        sent.append([bytes(piece) for piece in (length, numbers, seal)])
        if what == "another block":
            return [memoryview(piece) for piece in sent[0]]
        if what in ("numbers", "seal"):
            (numbers if what == "numbers" else seal)[3] ^= 1
        return [memoryview(piece) for piece in (length, numbers, seal)]

    if what == "another codec":
        monkeypatch.setattr("python_backends.kv.transfer.codec._MOST_ERROR", {"float16": 0.001, "int8": 1.0})
    monkeypatch.setattr(RoundingCodec, "encode", encode_badly)
    with pytest.raises(HandoffRefused, match="the seal is not the source's") as refused:
        rig.fetch(rig.publish([3, 8]), range(2), range(2))
    assert refused.value.reason is RefusalReason.DIGEST_MISMATCH
    monkeypatch.undo()
    assert rig.fetch(rig.publish([3, 8]), range(2), range(2)).rounded == "float16"
    rig.close()


def test_a_length_that_no_rounding_makes_is_refused_before_anything_is_read() -> None:
    codec = RoundingCodec(LAYOUT, "float16", KEY)
    for length in (0, 1, LAYOUT.block_bytes // 2 - 1, LAYOUT.block_bytes // 2 + 1, 1 << 30):
        with pytest.raises(BadEncoding, match="rounded bytes instead of"):
            codec.landing(length, np.zeros(LAYOUT.block_bytes, np.uint8))


def test_a_seal_is_of_one_block_only() -> None:
    """Whoever hears a block may play it back, for this very block."""
    blocks = pack(numbers_of(LAYOUT, 8), LAYOUT)
    codec, digests = RoundingCodec(LAYOUT, "float16", KEY), [block_digest(block) for block in blocks]
    head, *sent = (bytes(piece) for piece in codec.encode(blocks[0], digests[0]))
    (length,) = LENGTH.unpack(head)
    reader, target = RoundingCodec(LAYOUT, "float16", KEY), np.zeros(LAYOUT.block_bytes, np.uint8)
    for view, piece in zip(reader.landing(length, target), sent, strict=True):
        view[:] = piece
    assert reader.decode(length, target, digests[0])
    with pytest.raises(BadEncoding, match="seal"):
        reader.decode(length, target, digests[1])


# --- the choice -------------------------------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def raw(mib_per_s: float, mib: float = 10) -> Moved:
    return Moved(int(mib * MIB), int(mib * MIB), mib / mib_per_s, 0.0, "raw")


def test_what_is_named_is_done() -> None:
    for codec in ("lossless", "raw"):
        choice = CodecChoice(codec)
        choice.learn(SOURCE, raw(1))
        assert choice.choose(SOURCE, MIB, ["float16"]) == codec


@pytest.mark.parametrize(
    ("roundings", "mib_per_s", "codec"),
    [
        ([], 4.0, "lossless"),
        ([], 12.0, "lossless"),
        ([], 125.0, "raw"),
        (["float16"], 12.0, "float16"),
        (["float16", "int8"], 12.0, "int8"),
        (["float16", "int8"], 1000.0, "raw"),
    ],
)
def test_auto_encodes_for_slow_links_only(roundings: list[str], mib_per_s: float, codec: str) -> None:
    choice = CodecChoice("auto")
    assert choice.choose(SOURCE, MIB, roundings) == "raw", "an unknown link is measured first"
    choice.learn(SOURCE, raw(mib_per_s))
    assert choice.choose(SOURCE, MIB, roundings) == codec
    assert choice.choose(SOURCE, 1000, roundings) == "raw", "little gains nothing"
    assert choice.choose("10.0.0.2:7100", MIB, roundings) == "raw", "of another source nothing is known"


def test_nothing_is_rounded_for_a_small_gain() -> None:
    choice = CodecChoice("auto")
    choice.learn(SOURCE, raw(100))
    assert choice.choose(SOURCE, MIB, ["float16"]) == "float16"
    for _ in range(20):  # most blocks lose too much and are sent as they are
        choice.learn(SOURCE, Moved(10 * MIB, 9 * MIB, 0.1, 0.01, "float16"))
    assert choice.choose(SOURCE, MIB, ["float16"]) == "raw"


def test_a_small_handoff_says_nothing_of_the_link() -> None:
    choice = CodecChoice("auto")
    choice.learn(SOURCE, raw(0.1, mib=0.01))
    assert choice.choose(SOURCE, MIB) == "raw"


def test_a_codec_that_does_not_pay_is_left_and_tried_again_later() -> None:
    clock = Clock()
    choice = CodecChoice("auto", clock)
    choice.learn(SOURCE, raw(10))
    for _ in range(20):
        if choice.choose(SOURCE, MIB) == "raw":
            break
        choice.learn(SOURCE, Moved(10 * MIB, 10 * MIB, 1.1, 0.1, "lossless"))  # nothing to compress
    assert choice.choose(SOURCE, MIB) == "raw"
    clock.now += 61
    assert choice.choose(SOURCE, MIB) == "lossless"


def test_a_link_that_has_become_fast_is_noticed() -> None:
    choice = CodecChoice("auto")
    choice.learn(SOURCE, raw(4))
    for _ in range(40):
        if choice.choose(SOURCE, MIB) == "raw":
            break
        choice.learn(SOURCE, Moved(10 * MIB, int(8.7 * MIB), 0.05, 0.04, "lossless"))
    assert choice.choose(SOURCE, MIB) == "raw"
