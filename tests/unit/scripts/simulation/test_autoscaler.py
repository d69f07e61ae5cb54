"""Kubernetes' rules, computed by hand; the examples of its page "Horizontal Pod Autoscaling" among them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scripts.simulation.autoscaler import SYNC_S, Autoscaler, Metric, Pods, Policy, Rules, Spec

AT_ONCE = Rules(0.0, (Policy("Percent", 900, 15.0),))
VALUE = Metric("External", "m", 100.0, per_pod=False)
PER_POD = Metric("External", "m", 100.0)
OF_PODS = Metric("Pods", "m", 100.0)


def spec(*metrics: Metric, up: Rules = AT_ONCE, down: Rules = AT_ONCE, least: int = 1, most: int = 100) -> Spec:
    return Spec("d", least, most, metrics or (VALUE,), up, down)


def once(given: Spec, replicas: int, value: float | None, **pods: int) -> int:
    return Autoscaler(given).decide(0.0, Pods(replicas, **({"ready": replicas} | pods)), {"m": value})


class Run:
    """Of a Deployment whose pods are ready at once. `replicas`: of now."""

    def __init__(self, given: Spec, replicas: int) -> None:
        self._autoscaler = Autoscaler(given)
        self._now = 0.0
        self.replicas = replicas

    def sync(self, *values: float) -> list[int]:
        """The numbers of replicas after syncs that saw these values."""
        found = []
        for value in values:
            self.replicas = self._autoscaler.decide(self._now, Pods(self.replicas, self.replicas), {"m": value})
            self._now += SYNC_S
            found.append(self.replicas)
        return found


# --- from a metric to replicas ---


@pytest.mark.parametrize(
    ("replicas", "value", "expected"),
    [
        (3, 200.0, 6),  # "if the current metric value is 200m, and the desired value is 100m, replicas will be doubled"
        (4, 50.0, 2),  # "if the current value is instead 50m, halved"
        (10, 109.0, 10),  # "skips any scaling action if the ratio is sufficiently close to 1.0": by 0.1
        (10, 111.0, 12),
        (10, 91.0, 10),
        (10, 89.0, 9),
        (3, 140.0, 5),  # 4.2
        (100, 500.0, 100),  # at most
    ],
)
def test_replicas_follow_the_ratio_of_value_and_target(replicas: int, value: float, expected: int) -> None:
    assert once(spec(VALUE), replicas, value) == expected
    assert once(spec(PER_POD), replicas, value * replicas) == expected
    assert once(spec(OF_PODS), replicas, value * replicas) == expected


def test_the_largest_of_several_metrics_counts() -> None:
    two = Autoscaler(spec(VALUE, Metric("External", "other", 10.0)))
    assert two.decide(0.0, Pods(4, 4), {"m": 50.0, "other": 70.0}) == 7


def test_what_can_not_be_had_does_not_shrink() -> None:
    given = spec(VALUE, Metric("External", "other", 10.0))
    assert Autoscaler(given).decide(0.0, Pods(4, 4), {"m": 50.0}) == 4
    assert Autoscaler(given).decide(0.0, Pods(4, 4), {"m": 200.0}) == 8
    assert Autoscaler(given).decide(0.0, Pods(4, 4), {}) == 4


def test_pods_that_start_are_counted_as_each_kind_of_metric_does() -> None:
    """4 ready of 6. A value: ready ones x ratio. Per pod: of all there are. Of pods: those that start have nothing."""
    assert once(spec(VALUE), 6, 300.0, ready=4, pending=2) == 12
    assert once(spec(PER_POD), 6, 900.0, ready=4, pending=2) == 9
    assert once(spec(PER_POD), 6, 640.0, ready=4, pending=2) == 6  # 640 / 600 is near 1
    assert once(spec(OF_PODS), 6, 640.0, ready=4, pending=2) == 6  # 160 each, but 107 with two more
    assert once(spec(OF_PODS), 6, 480.0, ready=4, pending=2) == 6  # 120 each: more; 80 with two more: fewer; so neither
    assert once(spec(OF_PODS), 6, 900.0, ready=4, pending=2) == 9
    assert once(spec(OF_PODS), 6, 200.0, ready=4, pending=2) == 2  # 50 each: shrinking counts the ready ones


def test_replicas_are_brought_within_the_bounds_and_nothing_is_switched_on() -> None:
    assert once(spec(least=2, most=8), 9, 100.0) == 8
    assert once(spec(least=2, most=8), 1, 100.0) == 2
    assert once(spec(least=2, most=8), 2, 1.0) == 2
    assert once(spec(), 0, 500.0) == 0


# --- stabilisation ---


def test_shrinking_waits_until_nothing_in_the_window_wanted_more() -> None:
    """80 s: with a sync each 15 s, the wishes of the five syncs before. The present number is the first of them."""
    run = Run(spec(down=replace(AT_ONCE, window_s=80.0)), 10)
    assert run.sync(50, 50, 50, 50, 50, 50) == [10] * 6
    assert run.sync(50) == [5]


def test_a_wish_for_more_starts_the_window_anew() -> None:
    run = Run(spec(down=replace(AT_ONCE, window_s=40.0)), 10)
    assert run.sync(50, 50, 100, 50, 50, 50) == [10] * 5 + [5]


def test_shrinking_goes_as_far_as_the_most_in_the_window() -> None:
    run = Run(spec(down=replace(AT_ONCE, window_s=40.0)), 10)
    assert run.sync(40, 70, 40, 40, 40) == [10, 10, 10, 7, 4]  # the last wants 3, those before wanted 4


def test_growing_goes_as_far_as_the_least_in_the_window() -> None:
    """20 s: the sync before. At the beginning that is the present number, so a peak alone does nothing."""
    run = Run(spec(up=replace(AT_ONCE, window_s=20.0)), 10)
    assert run.sync(300, 100, 200, 150, 150, 150) == [10, 10, 10, 15, 15, 23]  # 15 wanted 23 one sync earlier


def test_without_a_window_growth_is_at_once() -> None:
    assert Run(spec(), 10).sync(150) == [15]


# --- policies ---


def test_the_default_grows_by_four_or_doubles_within_fifteen_seconds() -> None:
    grows = Spec("d", 1, 100, (PER_POD,))
    assert Run(grows, 1).sync(*[10_000.0] * 6) == [5, 10, 20, 40, 80, 100]


def test_the_default_shrinks_to_anything_after_five_minutes() -> None:
    run = Run(Spec("d", 1, 100, (PER_POD,)), 80)
    assert run.sync(*[100.0] * 20) == [80] * 20
    assert run.sync(100.0) == [1]


def test_the_example_of_pods_and_percent() -> None:
    """From 80 down, at most 4 pods or 10% per minute, whatever is more: 8 a minute at first, from 40 on 4 (72, 65, 59 ...)."""
    down = Rules(0.0, (Policy("Pods", 4, 60.0), Policy("Percent", 10, 60.0)))
    found = Run(spec(PER_POD, down=down), 80).sync(*[100.0] * 60)
    assert found[::4][:9] == [72, 64, 57, 51, 45, 40, 36, 32, 28]
    assert found[:4] == [72] * 4


def test_the_policy_that_allows_least_when_it_is_asked_for() -> None:
    down = Rules(0.0, (Policy("Pods", 4, 60.0), Policy("Percent", 10, 60.0)), "Min")
    assert Run(spec(PER_POD, down=down), 80).sync(100.0) == [76]
    assert Run(spec(PER_POD, down=down), 20).sync(100.0) == [18]


def test_a_direction_may_be_switched_off() -> None:
    off = Rules(0.0, (Policy("Percent", 100, 15.0),), "Disabled")
    assert Run(spec(down=off), 10).sync(1, 1, 200) == [10, 10, 20]
    assert Run(spec(up=off), 10).sync(500, 50) == [10, 5]


def test_changes_within_a_policys_period_are_its_budget() -> None:
    """Five pods a minute: three now leave two for the next 60 s."""
    run = Run(spec(PER_POD, up=Rules(0.0, (Policy("Pods", 5, 60.0),))), 10)
    assert run.sync(1300, 2000, 2000, 2000, 2000, 2000) == [13, 15, 15, 15, 18, 20]
