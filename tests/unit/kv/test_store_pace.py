from __future__ import annotations

import pytest

from python_backends.kv.store.pace import Pace


def test_nothing_is_known_at_first() -> None:
    assert Pace().seconds(100) is None


def test_latency_and_rate_are_told_apart() -> None:
    pace = Pace()
    for _ in range(50):
        pace.measure(0, 0.01)
        pace.measure(1000, 0.01 + 0.1)
    assert pace.seconds(0) == pytest.approx(0.01)
    assert pace.seconds(5000) == pytest.approx(0.01 + 0.5)


def test_a_latency_alone_is_a_lower_bound() -> None:
    pace = Pace()
    pace.measure(0, 0.2)
    assert pace.seconds(1 << 40) == pytest.approx(0.2)


def test_new_measurements_outweigh_old_ones() -> None:
    pace = Pace()
    for _ in range(20):
        pace.measure(1000, 1.0)
    for _ in range(20):
        pace.measure(1000, 0.1)
    assert pace.seconds(1000) == pytest.approx(0.1, rel=0.1)


def test_old_measurements_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace()
    pace.measure(1000, 1.0)
    assert pace.seconds(1000) is not None
    monkeypatch.setattr("python_backends.kv.store.pace._FORGOTTEN_S", 0.0)
    assert pace.seconds(1000) is None
