"""In which codec blocks are asked for: the one that is predicted to take the least time, over the link as it was measured.

    raw       bytes / link
    encoded   bytes x seconds of the codec per byte + bytes x share that is left / link

The two parts of the second line overlap in truth, so it is too high, and what is not sure to pay is not done. What rounds
must save a fifth of what the best of the exact ways takes: where little is gained, KV stays as it is.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_LEAST_BYTES = 256 << 10  # of a handoff that teaches anything, or is worth a codec
_WEIGHT = 0.25  # of a new measurement
_FORGOTTEN_S = 60.0  # a codec that did not pay is tried again after so long, where its first guess says so
_MOST_LINKS = 1024
_WORTH_ROUNDING = 0.8  # of the time of the best exact way


@dataclass(slots=True)
class _Cost:
    s_per_byte: float  # of KV, for both ends together
    share: float  # wire bytes per KV byte
    used_at: float = 0.0  # the last time, on the clock


# Seconds per byte and share at first: somewhat worse than what docs/transports.md has measured.
_FIRST_GUESSES = {
    "lossless": (1 / (256 << 20), 0.87),
    "float16": (1 / (400 << 20), 0.51),
    "int8": (1 / (160 << 20), 0.28),
}


@dataclass(frozen=True, slots=True)
class Moved:
    """One handoff as it went."""

    kv_bytes: int
    wire_bytes: int
    seconds: float
    codec_s: float  # of them, encoding and decoding
    codec: str


@dataclass(slots=True)
class _Link:
    s_per_byte: float | None = None  # on the wire
    costs: dict[str, _Cost] = field(default_factory=lambda: {name: _Cost(*guess) for name, guess in _FIRST_GUESSES.items()})


class CodecChoice:
    """What is known of each source. May be used from several threads."""

    def __init__(self, codec: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`codec`: as in `transfer.codec`, or one that rounds: that one wherever it may."""
        self._codec = codec
        self._clock = clock
        self._lock = threading.Lock()
        self._links: OrderedDict[str, _Link] = OrderedDict()

    def choose(self, address: str, kv_bytes: int, roundings: Sequence[str] = ()) -> str:
        """The codec to ask this source for. `roundings`: those that round which may be used now."""
        if self._codec in ("raw", "lossless", *roundings):
            return self._codec
        with self._lock:
            link = self._links.get(address)
            if link is None or link.s_per_byte is None or kv_bytes < _LEAST_BYTES:
                return "raw"
            seconds = {name: self._predicted(link, name) for name in ("raw", "lossless", *roundings)}
        exact = "lossless" if seconds["lossless"] < seconds["raw"] else "raw"
        rounded = min(roundings, key=lambda name: seconds[name], default=exact)
        return rounded if seconds[rounded] < _WORTH_ROUNDING * seconds[exact] else exact

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
            cost = link.costs.get(moved.codec)
            if cost is not None:
                cost.used_at = self._clock()
                cost.s_per_byte = _mixed(cost.s_per_byte, moved.codec_s / moved.kv_bytes)
                cost.share = _mixed(cost.share, moved.wire_bytes / moved.kv_bytes)

    def _predicted(self, link: _Link, codec: str) -> float:
        """Seconds per byte of KV."""
        assert link.s_per_byte is not None
        cost = link.costs.get(codec)
        if cost is None:
            return link.s_per_byte
        if self._clock() - cost.used_at > _FORGOTTEN_S:
            cost.s_per_byte, cost.share = _FIRST_GUESSES[codec]
        return cost.s_per_byte + cost.share * link.s_per_byte


def _mixed(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old)
