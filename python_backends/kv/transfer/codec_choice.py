"""Whether blocks are asked for encoded: only when encoding, sending less and decoding is predicted to take less time than
sending them as they are, over the link as it was measured.

    raw       bytes / link
    encoded   bytes x seconds of the codec per byte + bytes x share that is left / link

The two parts of the second line overlap in truth, so it is too high, and what is not sure to pay is not done.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

_LEAST_BYTES = 256 << 10  # of a handoff that teaches anything, or is worth the codec
_WEIGHT = 0.25  # of a new measurement
_FORGOTTEN_S = 60.0  # a codec that did not pay is tried again after so long, where its first guess says so
_MOST_LINKS = 1024

# First guesses, somewhat worse than what docs/transports.md has measured: both ends together.
_CODEC_S_PER_BYTE = 1 / (256 << 20)
_SHARE = 0.87


@dataclass(frozen=True, slots=True)
class Moved:
    """One handoff as it went."""

    kv_bytes: int
    wire_bytes: int
    seconds: float
    codec_s: float  # of them, encoding and decoding
    encoded: bool


@dataclass(slots=True)
class _Link:
    s_per_byte: float | None = None  # on the wire
    codec_s_per_byte: float = _CODEC_S_PER_BYTE
    share: float = _SHARE  # wire bytes per KV byte
    encoded_at: float = 0.0  # the last time, on the clock


class CodecChoice:
    """What is known of each source. May be used from several threads."""

    def __init__(self, codec: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`codec`: as in `transfer.codec`."""
        self._codec = codec
        self._clock = clock
        self._lock = threading.Lock()
        self._links: OrderedDict[str, _Link] = OrderedDict()

    def encoded(self, address: str, kv_bytes: int) -> bool:
        """Whether to ask this source for encoded blocks."""
        if self._codec != "auto":
            return self._codec == "lossless"
        with self._lock:
            link = self._links.get(address)
            if link is None or link.s_per_byte is None or kv_bytes < _LEAST_BYTES:
                return False
            if self._clock() - link.encoded_at > _FORGOTTEN_S:
                link.codec_s_per_byte, link.share = _CODEC_S_PER_BYTE, _SHARE
            return link.codec_s_per_byte + link.share * link.s_per_byte < link.s_per_byte

    def learn(self, address: str, moved: Moved) -> None:
        if moved.kv_bytes < _LEAST_BYTES or not moved.wire_bytes:
            return
        sending = max(moved.seconds - moved.codec_s, moved.seconds / 10) / moved.wire_bytes
        with self._lock:
            link = self._links.setdefault(address, _Link())
            self._links.move_to_end(address)
            if len(self._links) > _MOST_LINKS:
                self._links.popitem(last=False)
            link.s_per_byte = sending if link.s_per_byte is None else _mixed(link.s_per_byte, sending)
            if moved.encoded:
                link.encoded_at = self._clock()
                link.codec_s_per_byte = _mixed(link.codec_s_per_byte, moved.codec_s / moved.kv_bytes)
                link.share = _mixed(link.share, moved.wire_bytes / moved.kv_bytes)


def _mixed(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old)
