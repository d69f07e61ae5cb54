"""Keeps Python's garbage collector out of the way of streams."""

from __future__ import annotations

import gc


def freeze_what_is_there() -> None:
    """What a start has made stays until the end: libraries, weights, caches. Walking through it stops all streams for up to
    a tenth of a second.
    """
    gc.collect()
    gc.freeze()
