from __future__ import annotations

import struct

import msgspec
import pytest

from python_backends.core.layout import KVLayout
from python_backends.kv.store.value import (
    PREFIX_BYTES,
    VERSION,
    DamagedValue,
    ForeignValue,
    ValueHeader,
    decode_header,
    encode_header,
    header_length,
)

HEADER = ValueHeader("f" * 32, KVLayout(2, 3, 64, 16, "bfloat16"), bytes(range(16)), bytes(range(16, 32)))
# What version 1 has written into stores that this version must still read. Never change it.
VERSION_1 = bytes.fromhex(
    "42544b560100bd0085ab66696e6765727072696e74d9206666666666666666666666666666666666666666666666666666666666666666a6"
    "6c61796f757487aa6e756d5f6c617965727302ac6e756d5f6b765f686561647303a8686561645f64696d40aa626c6f636b5f73697a6510a5"
    "6474797065a862666c6f61743136a2747001a776657273696f6e01a468617368c410000102030405060708090a0b0c0d0e0fa66469676573"
    "74c410101112131415161718191a1b1c1d1e1fa5636f646563a3726177"
)


def read(value: bytes) -> ValueHeader:
    length = header_length(value[:PREFIX_BYTES])
    return decode_header(value[PREFIX_BYTES : PREFIX_BYTES + length])


def written_by(version: int, **changes: object) -> bytes:
    body = msgspec.msgpack.encode(msgspec.to_builtins(HEADER, builtin_types=(bytes,)) | changes)
    return struct.pack("<4sHH", b"BTKV", version, len(body)) + body


def test_round_trip() -> None:
    assert read(encode_header(HEADER)) == HEADER


def test_values_of_version_1_are_read_for_as_long_as_promised() -> None:
    assert VERSION <= 2, "version 1 need not be read any more: freeze the bytes of the version before this one here"
    assert read(VERSION_1) == HEADER


@pytest.mark.parametrize("version", [VERSION, VERSION - 1])
def test_this_version_and_the_one_before_are_read(version: int) -> None:
    assert read(written_by(version)) == HEADER


def test_fields_added_later_are_passed_over() -> None:
    assert read(written_by(VERSION, colour="blue")) == HEADER


@pytest.mark.parametrize("value", [written_by(VERSION + 1), written_by(VERSION, codec="zip")])
def test_what_others_may_read_is_foreign(value: bytes) -> None:
    with pytest.raises(ForeignValue):
        read(value)


NO_UTF8 = written_by(1).replace(HEADER.fingerprint.encode(), b"\xff" * len(HEADER.fingerprint))


@pytest.mark.parametrize(
    "value", [b"XXXX" + written_by(1)[4:], written_by(1)[:40], written_by(1, layout=7), bytes(100), NO_UTF8]
)
def test_nonsense_is_damaged(value: bytes) -> None:
    with pytest.raises(DamagedValue):
        read(value)
