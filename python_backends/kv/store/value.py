"""A block as it lies in a remote store: a header that says what it is, then its bytes.

    4 bytes   magic "BTKV"
    2 bytes   version, little-endian
    2 bytes   length of the header that follows
    header    msgpack of ValueHeader
    rest      the block, KVLayout.block_shape, in the header's codec

This version reads its own values and those of the version before, so that workers can be replaced one by one; values of
any other version are as good as absent. A field added to the header gets a default and keeps the version; whatever else
changes raises it.
"""

from __future__ import annotations

import struct

import msgspec

from python_backends.core.errors import UNREADABLE
from python_backends.core.layout import KVLayout

VERSION = 1
PREFIX_BYTES = 8
_PREFIX = struct.Struct("<4sHH")
_MAGIC = b"BTKV"
_READABLE = (VERSION, VERSION - 1)


class ForeignValue(Exception):
    """Of a version or codec that is not read here. Others may read it."""


class DamagedValue(Exception):
    """Not what its key says. Nobody can use it."""


class ValueHeader(msgspec.Struct, frozen=True):
    fingerprint: str
    layout: KVLayout
    hash: bytes  # of the block; equal to the key's
    digest: bytes  # xxh3_128 of the block's bytes, decoded
    codec: str = "raw"


def encode_header(header: ValueHeader) -> bytes:
    """Everything before the block's bytes."""
    body = _encoder.encode(header)
    return _PREFIX.pack(_MAGIC, VERSION, len(body)) + body


def header_length(prefix: bytes) -> int:
    """Bytes of the header behind the first PREFIX_BYTES of a value. Raises ForeignValue or DamagedValue."""
    magic, version, length = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise DamagedValue("no magic number")
    if version not in _READABLE:
        raise ForeignValue(f"version {version}, this worker reads {VERSION}")
    return int(length)


def decode_header(body: bytes) -> ValueHeader:
    """Raises ForeignValue or DamagedValue."""
    try:
        header = _decoder.decode(body)
    except UNREADABLE as error:
        raise DamagedValue(str(error)) from error
    if header.codec != "raw":
        raise ForeignValue(f"codec {header.codec!r}")
    return header


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ValueHeader)
