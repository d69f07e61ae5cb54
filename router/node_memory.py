"""Keeps the node store's memory alive while its workers are being restarted, even if it is all of them at once.

The router does not look into it. It lets go when no worker has named the memory for a while, or when the router ends.
"""

from __future__ import annotations

import logging
from pathlib import Path

from python_backends.core.shared_memory import NODE_MEMORY, Membership, hold

log = logging.getLogger(__name__)

_KEPT_S = 600.0  # without a worker that uses it


class NodeMemory:
    """Belongs to the router's event loop. Nothing here waits."""

    def __init__(self) -> None:
        self._held: dict[str, Membership] = {}
        self._named: dict[str, float] = {}  # meeting place -> monotonic s when a worker named it last

    def named(self, place: str, now: float) -> None:
        """A worker says that it uses the memory of this meeting place."""
        self._named[place] = now
        if place not in self._held:
            membership = hold(Path(place), NODE_MEMORY)
            if membership is not None:  # else at its next heartbeat; on another host never
                self._held[place] = membership

    def tidy(self, now: float) -> None:
        """Let go of what nobody names any more."""
        for place in [place for place, named in self._named.items() if now - named > _KEPT_S]:
            del self._named[place]
            membership = self._held.pop(place, None)
            if membership is not None:
                log.info("no worker has used the node store at %s for %.0f s; letting it go", place, _KEPT_S)
                membership.close()

    def close(self) -> None:
        for membership in self._held.values():
            membership.close()
        self._held.clear()
