"""What Kubernetes' HorizontalPodAutoscaler decides, by the rules of autoscaling/v2 and its controller.

Every 15 s, for each metric: desired = ceil(current x value / target), unless value / target is within the tolerance of 1; the
largest of all metrics counts. Then the stabilisation windows - of what was desired lately, growth goes as far as the least and
shrinking as far as the most; when it begins, the present number is what was desired lately - then the policies, which bound
the change per period, then the bounds. (Kubernetes, "Horizontal Pod Autoscaling"; the controller's sources where that page is
silent: which pods are counted for which kind of metric.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SYNC_S = 15.0  # --horizontal-pod-autoscaler-sync-period
TOLERANCE = 0.1  # --horizontal-pod-autoscaler-tolerance
DOWN_WINDOW_S = 300.0  # --horizontal-pod-autoscaler-downscale-stabilization


@dataclass(frozen=True, slots=True)
class Policy:
    """At most so many pods, or so many percent of them, within the period."""

    kind: Literal["Pods", "Percent"]
    value: int
    period_s: float


@dataclass(frozen=True, slots=True)
class Rules:
    """Of one direction. select: whether the policy that allows most counts, or least, or nothing is changed at all."""

    window_s: float
    policies: tuple[Policy, ...]
    select: Literal["Max", "Min", "Disabled"] = "Max"
    tolerance: float = TOLERANCE


DEFAULT_UP = Rules(0.0, (Policy("Pods", 4, 15.0), Policy("Percent", 100, 15.0)))
DEFAULT_DOWN = Rules(DOWN_WINDOW_S, (Policy("Percent", 100, 15.0),))


@dataclass(frozen=True, slots=True)
class Metric:
    """`Pods`: a figure of each pod, of which the mean counts. `External`: one figure, per pod or by itself."""

    kind: Literal["Pods", "External"]
    name: str
    target: float
    per_pod: bool = True


@dataclass(frozen=True, slots=True)
class Spec:
    """One HorizontalPodAutoscaler. `target`: the Deployment's name."""

    target: str
    least: int
    most: int
    metrics: tuple[Metric, ...]
    up: Rules = DEFAULT_UP
    down: Rules = DEFAULT_DOWN


@dataclass(frozen=True, slots=True)
class Pods:
    """As the controller sees them. `wanted`: spec.replicas; the others are those there are, without those that end."""

    wanted: int
    ready: int
    pending: int = 0  # not ready yet

    @property
    def there(self) -> int:
        return self.ready + self.pending


@dataclass(slots=True)
class Autoscaler:
    """One HorizontalPodAutoscaler and what its controller remembers."""

    spec: Spec
    _desired: list[tuple[float, int]] = field(default_factory=list)  # when, and what the metrics wanted
    _added: list[tuple[float, int]] = field(default_factory=list)
    _removed: list[tuple[float, int]] = field(default_factory=list)

    def decide(self, now: float, pods: Pods, values: Mapping[str, float | None]) -> int:
        """The number of replicas from now on. now: s.

        values: of the metrics by name: of kind `Pods` the sum over the ready ones. None: not to be had.
        """
        if not self._desired:
            self._desired.append((now, pods.wanted))
        spec, current = self.spec, pods.wanted
        if not current:
            return 0  # it is switched off
        if spec.least <= current <= spec.most:
            proposed = self._propose(pods, values)
            if proposed is None:
                return current
            replicas = self._limited(now, current, self._stable(now, current, proposed))
        else:
            replicas = min(max(current, spec.least), spec.most)
        if replicas > current:
            self._added.append((now, replicas - current))
        elif replicas < current:
            self._removed.append((now, current - replicas))
        return replicas

    # --- from metrics to replicas ---

    def _propose(self, pods: Pods, values: Mapping[str, float | None]) -> int | None:
        """The largest of the metrics' proposals. None: nothing can be said, or only that fewer do, and not by all metrics."""
        known = [(metric, value) for metric in self.spec.metrics if (value := values.get(metric.name)) is not None]
        if not known:
            return None
        proposed = max(self._proposal(metric, pods, value) for metric, value in known)
        return None if len(known) < len(self.spec.metrics) and proposed < pods.wanted else proposed

    def _proposal(self, metric: Metric, pods: Pods, value: float) -> int:
        if metric.kind == "Pods":
            return self._by_pods(metric, pods, value)
        if not metric.per_pod:
            ratio = value / metric.target
            return pods.wanted if self._is_near(ratio) else _ceil(ratio * pods.ready)
        near = self._is_near(value / (metric.target * pods.there))
        return pods.there if near else _ceil(value / metric.target)

    def _by_pods(self, metric: Metric, pods: Pods, total: float) -> int:
        """Pods that aren't ready would take part of what there is too much of, so they count as having nothing."""
        if not pods.ready:
            return pods.wanted
        ratio = total / (metric.target * pods.ready)
        if not pods.pending or ratio <= 1:
            return pods.wanted if self._is_near(ratio) else _ceil(ratio * pods.ready)
        shared = total / (metric.target * pods.there)
        replicas = _ceil(shared * pods.there)
        return pods.wanted if self._is_near(shared) or shared < 1 or replicas < pods.wanted else replicas

    def _is_near(self, ratio: float) -> bool:
        return 1 - self.spec.down.tolerance <= ratio <= 1 + self.spec.up.tolerance

    # --- what is done of it, and when ---

    def _stable(self, now: float, current: int, proposed: int) -> int:
        up_from, down_from = now - self.spec.up.window_s, now - self.spec.down.window_s
        least = min([proposed, *(desired for when, desired in self._desired if when > up_from)])
        most = max([proposed, *(desired for when, desired in self._desired if when > down_from)])
        oldest = min(up_from, down_from)
        self._desired = [(when, desired) for when, desired in self._desired if when > oldest] + [(now, proposed)]
        return min(max(current, least), most)

    def _limited(self, now: float, current: int, wanted: int) -> int:
        if wanted > current:
            return min(wanted, self.spec.most, max(self._bound(now, current, self.spec.up, 1), current))
        if wanted < current:
            return max(wanted, self.spec.least, min(self._bound(now, current, self.spec.down, -1), current))
        return current

    def _bound(self, now: float, current: int, rules: Rules, way: Literal[1, -1]) -> int:
        """How far the policies let it go, each from the number of replicas at the beginning of its period. way: up or down."""
        if rules.select == "Disabled":
            return current
        bounds = []
        for policy in rules.policies:
            since = now - policy.period_s
            added = sum(count for when, count in self._added if when > since)
            removed = sum(count for when, count in self._removed if when > since)
            start = current - added + removed
            bounds.append(start + way * _allowed(start, policy, way))
        self._forget(now)
        return max(bounds) if (way > 0) is (rules.select == "Max") else min(bounds)

    def _forget(self, now: float) -> None:
        """Changes that no policy asks for any more."""
        longest = now - max(policy.period_s for policy in (*self.spec.up.policies, *self.spec.down.policies))
        self._added = [event for event in self._added if event[0] > longest]
        self._removed = [event for event in self._removed if event[0] > longest]


def _allowed(start: int, policy: Policy, way: Literal[1, -1]) -> int:
    """Pods. A percentage is rounded up, or a few pods would never become more or less."""
    if policy.kind == "Pods":
        return policy.value
    return _ceil(start * policy.value / 100) if way > 0 else start - int(start * (100 - policy.value) / 100)


def _ceil(value: float) -> int:
    """Metrics are thousandths in Kubernetes, so nothing smaller than rounding errors makes one more."""
    return math.ceil(round(value, 9))
