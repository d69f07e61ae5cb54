"""The lossless codec: what comes out is what went in, or one clear error; and when it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from python_backends.core.errors import HandoffRefused, RefusalReason
from python_backends.kv.transfer.base import Fetched
from python_backends.kv.transfer.codec import LENGTH, BadEncoding, PlaneCodec
from python_backends.kv.transfer.codec_choice import CodecChoice, Moved
from python_backends.kv.transfer.server import TransferServer
from python_backends.kv.transfer.session import Session
from python_backends.kv.transfer.tcp import TcpTransport
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
    server = TransferServer("127.0.0.1", (), KEY, None, 5.0, encodes=False)
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
    monkeypatch.setattr(PlaneCodec, "encode", lambda codec, block: damage(encode_well(codec, block)))
    with pytest.raises(HandoffRefused, match="block 0 of prefill arrived damaged") as refused:
        fetch(rig)
    assert refused.value.reason is RefusalReason.DIGEST_MISMATCH
    monkeypatch.undo()
    assert fetch(rig).codec == "lossless"


def test_a_block_reused_while_it_is_encoded_is_stale(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_well = PlaneCodec.encode

    def encode_late(codec: PlaneCodec, block: Bytes) -> list[memoryview]:
        rig.source.generations[8] += np.uint64(1)
        return encode_well(codec, block)

    monkeypatch.setattr(PlaneCodec, "encode", encode_late)
    assert rig.refusal(rig.publish([3, 8])) is RefusalReason.STALE_EPOCH


# --- the choice -------------------------------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def raw(mib_per_s: float, mib: float = 10) -> Moved:
    return Moved(int(mib * MIB), int(mib * MIB), mib / mib_per_s, 0.0, encoded=False)


def test_what_is_named_is_done() -> None:
    for codec, encoded in (("lossless", True), ("raw", False)):
        choice = CodecChoice(codec)
        choice.learn(SOURCE, raw(1))
        assert choice.encoded(SOURCE, MIB) is encoded


@pytest.mark.parametrize(("mib_per_s", "encoded"), [(4.0, True), (12.0, True), (125.0, False), (1000.0, False)])
def test_auto_encodes_for_slow_links_only(mib_per_s: float, encoded: bool) -> None:
    choice = CodecChoice("auto")
    assert not choice.encoded(SOURCE, MIB), "an unknown link is measured first"
    choice.learn(SOURCE, raw(mib_per_s))
    assert choice.encoded(SOURCE, MIB) is encoded
    assert not choice.encoded(SOURCE, 1000), "little gains nothing"
    assert not choice.encoded("10.0.0.2:7100", MIB), "of another source nothing is known"


def test_a_small_handoff_says_nothing_of_the_link() -> None:
    choice = CodecChoice("auto")
    choice.learn(SOURCE, raw(0.1, mib=0.01))
    assert not choice.encoded(SOURCE, MIB)


def test_a_codec_that_does_not_pay_is_left_and_tried_again_later() -> None:
    clock = Clock()
    choice = CodecChoice("auto", clock)
    choice.learn(SOURCE, raw(10))
    for _ in range(20):
        if not choice.encoded(SOURCE, MIB):
            break
        choice.learn(SOURCE, Moved(10 * MIB, 10 * MIB, 1.1, 0.1, encoded=True))  # nothing to compress
    assert not choice.encoded(SOURCE, MIB)
    clock.now += 61
    assert choice.encoded(SOURCE, MIB)


def test_a_link_that_has_become_fast_is_noticed() -> None:
    choice = CodecChoice("auto")
    choice.learn(SOURCE, raw(4))
    for _ in range(40):
        if not choice.encoded(SOURCE, MIB):
            break
        choice.learn(SOURCE, Moved(10 * MIB, int(8.7 * MIB), 0.05, 0.04, encoded=True))
    assert not choice.encoded(SOURCE, MIB)
