"""What the times of a request teach about its workers: hop and link, and steps where the worker does not tell them itself."""

from __future__ import annotations

from python_backends.core.messages import PrefillDone, StepSample
from python_backends.core.types import KVReport, WorkerId
from router.clock import Clock
from router.fleet import Fleet, WorkerView

_GAP_EVERY = 8  # tokens of a stream


class Lessons:
    """Of one request. `submitted` comes before what it took."""

    def __init__(self, fleet: Fleet, clock: Clock) -> None:
        self._fleet = fleet
        self._clock = clock
        self._since = clock.now()
        self._alone = False
        self._prompts = self._streams = self._context = 0  # tokens, requests, tokens that were at the worker beside it

    def submitted(self, worker: WorkerId, prefill_tokens: int) -> None:
        """prefill_tokens: of its own that the worker is expected to compute. The request counts as charged to the worker."""
        self._since = self._clock.now()
        view = self._fleet.get(worker)
        if view is not None:
            self._alone = view.requests == 1
            self._prompts = max(view.prefill_tokens - prefill_tokens, 0)
            self._streams, self._context = view.streams, view.context_tokens

    def prefilled(self, worker: WorkerId, done: PrefillDone) -> None:
        view = self._fleet.get(worker)
        if view is None:
            return
        if self._alone:
            view.learn_hop(self._passed_ms() - done.compute_ms)
        self._prompt(view, done.reused_tokens, done.computed_tokens, done.compute_ms)

    def first_token(self, worker: WorkerId, reused: int, computed: int) -> None:
        """Of a worker that computes the prompt and goes on."""
        view = self._fleet.get(worker)
        if view is not None:
            self._prompt(view, reused, computed, self._passed_ms() - view.hop_ms)

    def kv_ready(self, worker: WorkerId, report: KVReport) -> None:
        view = self._fleet.get(worker)
        if view is not None:
            view.link.learn(report.received_bytes, report.transfer_ms, self._passed_ms())

    def gap(self, worker: WorkerId, num_output: int, new: int, gap_s: float) -> None:
        """A stream got `new` tokens, `num_output` in all, so long after those before. Looked at now and then."""
        if num_output % _GAP_EVERY:
            return
        view = self._fleet.get(worker)
        if view is not None and not view.tells_steps and not view.prompts:
            view.learn_times(StepSample(0, 0.0, max(view.streams, 1), view.context_tokens, gap_s * 1e3 / new))

    def _prompt(self, view: WorkerView, reused: int, computed: int, ms: float) -> None:
        """All prompts that were there are taken to be computed when this one is."""
        others = self._prompts
        pairs = computed * (reused + computed / 2) + others * min(others, view.step_tokens) / 2
        view.learn_times(StepSample(computed + others, pairs, self._streams, self._context, ms))

    def _passed_ms(self) -> float:
        return (self._clock.now() - self._since) * 1e3
