"""Baton's metrics on Triton's metrics port. What there is, and what is counted when, is in router/metrics.py."""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any

import triton_python_backend_utils as pb_utils

from router.metrics import FAMILIES, Change, Kind, Labels

log = logging.getLogger(__name__)

_STOP_S = 5.0


class TritonSink:
    """Implements router.metrics.Sink. Each change is a call between processes: a thread of its own makes them."""

    def __init__(self) -> None:
        self._families: dict[str, Any] = {}
        for family in FAMILIES:
            kind = pb_utils.MetricFamily.GAUGE if family.kind is Kind.GAUGE else pb_utils.MetricFamily.COUNTER
            for name in family.exported:
                self._families[name] = pb_utils.MetricFamily(name=name, description=family.meaning, kind=kind)
        self._metrics: dict[tuple[str, Labels], Any] = {}
        self._queue: queue.SimpleQueue[list[Change] | None] = queue.SimpleQueue()
        self._ready = True
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        return self._ready

    def push(self, changes: list[Change]) -> None:
        self._ready = False
        self._queue.put(changes)

    def close(self) -> None:
        """Let go of the server's objects: Triton's stub crashes when they outlive the model."""
        self._queue.put(None)
        self._thread.join(_STOP_S)
        self._metrics.clear()
        self._families.clear()

    def _run(self) -> None:
        while (changes := self._queue.get()) is not None:
            try:
                for change in changes:
                    self._apply(change)
            except pb_utils.TritonModelException as error:
                log.warning("metrics could not be set: %s", error)
            self._ready = True

    def _apply(self, change: Change) -> None:
        key = (change.name, change.labels)
        metric = self._metrics.get(key)
        if metric is None:
            metric = self._metrics[key] = self._families[change.name].Metric(labels=dict(change.labels))
        if change.is_gauge:
            metric.set(change.amount)
        elif change.amount:
            metric.increment(change.amount)
