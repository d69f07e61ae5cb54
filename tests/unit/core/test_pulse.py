from __future__ import annotations

import pytest

from python_backends.core.pulse import idle_heartbeat_s


@pytest.mark.parametrize(
    ("heartbeat_s", "silent_s", "idle_s"),
    [(0.2, 5.0, 1.0), (0.2, 60.0, 1.0), (0.2, 2.0, 0.4), (0.2, 0.5, 0.2)],
    ids=["the defaults", "five times as long", "five within the silence", "never more often than asked"],
)
def test_pause_while_nothing_happens(heartbeat_s: float, silent_s: float, idle_s: float) -> None:
    assert idle_heartbeat_s(heartbeat_s, silent_s) == pytest.approx(idle_s)
