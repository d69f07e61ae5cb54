"""How much is computed beside running streams: as much as keeps the time between their tokens.

A chunk of a prompt makes everybody in the step wait. Where a time between tokens is aimed at, a step with streams takes
as many prompt tokens as fit into that time, by what steps like it have taken, instead of a fixed number: more where
streams are few and short, fewer where they are many (Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference
with Sarathi-Serve", OSDI 2024, choose a fixed number for a target by profiling beforehand).

Guesses of streams' next tokens (speculation.py) are computed as prompt tokens are, and get what those leave.

Steps take longer or shorter than predicted; by how much depends on what else the machine does. So what steps are kept to
is a share of the target that is learned: with steps that take about so long, every gap between a stream's tokens that is
longer than the target lowers it, and every other raises it a little, so that about one in a hundred is too long (Robbins and
Monro, "A Stochastic Approximation Method", 1951). Steps of many streams alone count, too: routers give a worker only as many
streams as it takes no longer for (router/policy.py).

Who comes from a prefill worker sits out the rest of a step, and its first gap is up to two of them. So steps of half the
target may still be too long; then those gaps lower the share by themselves.

Where workers share cores, streams that are faster than that let others have the cores between their steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec

from python_backends.core.messages import StepSample
from python_backends.core.step_model import StepModel, longest_step_ms, tokens_within

_LATE = 0.01  # of the gaps, with steps that are expected to take ...
_FULL = 0.8  # ... at least so much of what they may
_MOST_FULL = 1.01  # ... and at most: those that were given time to spare end where they may, give or take a rounding
_RATE = 0.1
_LEAST, _MOST = 0.4, 0.95  # of the target


class StepAllowance:
    """How long steps with streams may take: a share of the target that is learned.

    step_ms: now.
    """

    def __init__(self, itl_ms: float) -> None:
        """itl_ms: the target between tokens, more than 0."""
        self.step_ms = longest_step_ms(itl_ms)
        self._itl_ms = itl_ms

    def learn(self, expected_ms: float, gap_ms: float, streams: int, joined_ms: Sequence[float]) -> None:
        """A step with so many streams has been computed.

        joined_ms: of each stream that has come from a prefill worker and has its first token here by it, what it has waited
        for steps, this one included. The others had gap_ms between two tokens, and were to have expected_ms.
        """
        running = streams - len(joined_ms)
        late = sum(ms > self._itl_ms for ms in joined_ms)
        if _FULL * self.step_ms <= expected_ms <= _MOST_FULL * self.step_ms:
            self._adapt((late + running * (gap_ms > self._itl_ms)) / streams)
        elif late and running:
            self._adapt(late / streams)

    def _adapt(self, late: float) -> None:
        share = self.step_ms / self._itl_ms * math.exp(_RATE * (_LATE - late))
        self.step_ms = min(max(share, _LEAST), _MOST) * self._itl_ms


class StepLimit:
    """Belongs to the engine's thread.

    lost_ms: how much of what a step may take the streams of the next one have waited since their last; who uses it sets it.
    """

    def __init__(self, itl_ms: float, step_tokens: int, calibration: Iterable[StepSample]) -> None:
        """itl_ms: the target between tokens, more than 0."""
        self.lost_ms = 0.0
        self._allowance = StepAllowance(itl_ms)
        self._step_tokens = step_tokens
        self._model = StepModel(calibration)

    @property
    def step_ms(self) -> float:
        """What steps with streams are kept to now."""
        return self._allowance.step_ms

    def prompt_tokens(self, streams: int, context: int, depth: float) -> int:
        """Beside so many streams of `context` tokens together, of prompts of which `depth` tokens are computed on average."""
        most = max(self._step_tokens - streams, 1)
        return tokens_within(self._model, self.step_ms - self.lost_ms, streams, context, depth, most)

    def draft_tokens(self, streams: int, context: int, prompt_tokens: int) -> int:
        """Guesses of all streams together, beside so many prompt tokens in the step. streams: at least one."""
        depth = context / streams
        room = self.prompt_tokens(streams, context, depth)
        fits = self._model.step_ms(room, room * (depth + room / 2), streams, context) <= self.step_ms - self.lost_ms
        return max(room - prompt_tokens, 0) if fits else 0

    def spare_ms(self, streams: int, context: int) -> float:
        """Between two steps of these streams alone, if the next is to end in time; 0 or less: none."""
        return self.step_ms - self._model.step_ms(0, 0, streams, context)

    def learn(self, step: StepSample, drafts: int = 0, joined_ms: Sequence[float] = ()) -> None:
        """A step has been computed, with streams or without. drafts: guesses in it.

        joined_ms: see StepAllowance.learn.
        """
        if drafts:
            depth = step.decode_context / step.decode_streams
            tokens, pairs = step.prefill_tokens + drafts, step.prefill_context + drafts * depth
            step = msgspec.structs.replace(step, prefill_tokens=tokens, prefill_context=pairs)
        if step.decode_streams:
            shape = step.prefill_tokens, step.prefill_context, step.decode_streams, step.decode_context
            expected_ms = self.lost_ms + self._model.step_ms(*shape)
            self._allowance.learn(expected_ms, self.lost_ms + step.ms, step.decode_streams, joined_ms)
        self._model.learn(step)
