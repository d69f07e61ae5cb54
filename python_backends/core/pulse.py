"""How often workers and routers tell that they live."""

from __future__ import annotations

_IDLE = 5  # times as long
_PER_SILENCE = 5  # so many heartbeats at least within the silence after which somebody counts as gone


def idle_heartbeat_s(heartbeat_s: float, silent_s: float) -> float:
    """Seconds between heartbeats while there is nothing new to tell: who wakes up for nothing keeps a core from sleeping."""
    return max(heartbeat_s, min(_IDLE * heartbeat_s, silent_s / _PER_SILENCE))
