"""How long a worker's steps take, in milliseconds, learned from steps.

A step of a batching engine takes

    ms = constant + a * prefill tokens + b * prefill tokens x context + c * streams + d * context of the streams

with coefficients that are never negative: weights are read once, every token is multiplied with them, every query attends
to its context. `StepModel` fits them per worker by recursive least squares, in the form of normal equations with
exponential forgetting (Ljung, System Identification, 2nd ed., section 11.2), every sample divided by its own time, so that
relative errors count. The non-negative solution is found by coordinate descent (Franc, Hlavac, Navara, "Sequential
Coordinate-wise Algorithm for the Non-negative Least Squares Problem", CAIP 2005). Steps with and without prompts are
forgotten separately, or an hour of decoding would wipe out what a prompt costs. What the linear form misses - a product
with 4 rows may take longer than one with 8 - is a factor per size of step, learned as a running mean.

The machine may have been busy with something else while a worker was calibrated. Who seems slow is given no work that would
show that it is not; so the first steps it reports, those of canaries, correct all of calibration by how far it was off there.

The router predicts with it, and an engine decides how much of a prompt it computes beside running streams. Nothing here
knows workers, requests or the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import mul
from typing import Protocol

from python_backends.core.messages import StepSample

TERMS = ("constant", "prefill_token", "prefill_context", "decode_stream", "decode_context")
"""The coefficients of a StepModel by name, in ms per unit."""

_UNKNOWN = (5.0, 0.2, 0.0, 0.5, 0.0)  # of a worker of which nothing at all is known
_MEMORY = 50  # samples after which one counts for 1/e of a new one
_CALIBRATION_WEIGHT = 0.2  # of a calibration step against a new sample; it is never forgotten
_SOLVE_EVERY = 16  # samples
_FIRST_SOLVES = (1, 2, 4, 8)
_SWEEPS = 30
_FACTORS = 64  # sizes of step, by powers of two
_FACTOR_RATE = 0.1
_DRIFT_RATE = 0.02
_ERROR_RATE = 0.05
_KNOWN_AFTER = 32  # samples
_QUICK_MS = 20.0  # of steps of streams alone that take less ...
_ONE_IN = 4  # ... one in so many is learned from
_LEAST_MS = 1e-3  # no step takes less; a prediction below says nothing
_SHARE_OF_ITL = 0.8  # predictions are off by some, and a stream has its token a moment after the step
_LEAST_SHARE = 16
_OUTLIER = 3.0  # a step so many times longer than expected counts as so long: the machine did something else meanwhile

LINEAR = (1.0,) * (2 * _FACTORS)
"""Factors of steps whose times are linear."""


class Steps(Protocol):
    """Whatever knows how long steps take."""

    @property
    def coefficients(self) -> Sequence[float]:
        """Of TERMS."""

    @property
    def factors(self) -> Sequence[float]:
        """What the linear form is multiplied with, by size of step: see _size."""

    def step_ms(self, prefill_tokens: float, prefill_context: float, streams: float, context: float) -> float: ...


def longest_step_ms(itl_ms: float) -> float:
    """What steps beside running streams are kept to where so many ms between tokens are aimed at; 0: no limit."""
    return _SHARE_OF_ITL * itl_ms


def tokens_within(model: Steps, ms: float, streams: int, context: float, depth: float, most: int) -> int:
    """How many prompt tokens a step may compute beside running streams to take at most so long.

    context: of the streams together. depth: prompt tokens before those to be computed. At most `most`, which is a full
    step's; and at least a sixteenth of that however long it takes, or a prompt would never be done where streams are many.
    """
    least, factors = max(most // _LEAST_SHARE, 1), model.factors
    # Spelt out, since a decision of the router asks some ten times for several steps each: step_ms(tokens, tokens x (depth +
    # tokens / 2), streams, context) is (fixed + tokens x (token + tokens x half)) x factor.
    constant, token, pair, stream, deep = model.coefficients
    fixed, token, half = constant + stream * streams + deep * context, token + pair * depth, pair / 2
    alone = fixed * factors[streams.bit_length()]
    tokens = most
    while tokens > least:
        taken = (fixed + tokens * (token + tokens * half)) * factors[tokens.bit_length() - _FACTORS]
        if taken <= ms:
            return tokens
        # The time grows faster than the tokens, so what lies on the line between the two is early enough.
        fit = int(tokens * (ms - alone) / (taken - alone)) if taken > alone else 0
        tokens = min(fit, tokens - 1)
    return least


class StepModel:
    """Milliseconds of one worker's steps.

    `coefficients`: of TERMS. `error`: running mean of |predicted - real| / real. `samples`: how many were learned;
    `prompt_samples`: of these, with prompts.
    """

    def __init__(self, calibration: Iterable[StepSample] = (), like: StepModel | None = None) -> None:
        """Begins with what calibration says; without any, with what is known of another worker (`like`)."""
        self.coefficients: list[float] = list(like.coefficients if like else _UNKNOWN)
        self.samples = self.prompt_samples = 0
        self.error = 0.0
        self._passed_over = 0
        self.factors: list[float] = list(like.factors) if like else list(LINEAR)
        self._with_prompts = _Memory(_MEMORY)
        self._without = _Memory(_MEMORY)
        self._calibration = _Memory(math.inf)
        self._drift = 0.0  # logarithm of how many times longer steps take than calibration says
        for sample in calibration:
            self._calibration.add(_features(sample, sample.ms))
        self._solve(sweeps=50 * _SWEEPS)
        self._calibrated = tuple(self.coefficients)

    def step_ms(self, prefill_tokens: float, prefill_context: float, streams: float, context: float) -> float:
        """Of one step; the arguments are StepSample's."""
        constant, token, pair, stream, depth = self.coefficients
        ms = constant + token * prefill_tokens + pair * prefill_context + stream * streams + depth * context
        if prefill_tokens >= 1:  # as _size says, without the call: this is asked dozens of times per decision
            return ms * self.factors[int(prefill_tokens).bit_length() - _FACTORS]
        return ms * self.factors[int(streams).bit_length()]

    def learn(self, sample: StepSample) -> None:
        """Take in a step that has happened."""
        shape = (sample.prefill_tokens, sample.prefill_context, sample.decode_streams, sample.decode_context)
        if sample.ms <= 0 or not sample.prefill_tokens + sample.decode_streams:
            return
        known = self.samples >= _KNOWN_AFTER
        if known and not sample.prefill_tokens and sample.ms < _QUICK_MS:  # there are many, one like the other
            self._passed_over = (self._passed_over + 1) % _ONE_IN
            if self._passed_over:
                return
        expected = self.step_ms(*shape)
        ms = min(sample.ms, _OUTLIER * expected) if known and expected > _LEAST_MS else sample.ms
        self.error += (_ERROR_RATE if known else 1 / (self.samples + 1)) * (abs(expected - ms) / ms - self.error)
        self.samples += 1
        self.prompt_samples += bool(sample.prefill_tokens)
        (self._with_prompts if sample.prefill_tokens else self._without).add(_features(sample, ms))
        ratio = _bounded(ms / max(_linear(self._calibrated, shape), _LEAST_MS), 10.0)
        self._drift += max(_DRIFT_RATE, 1 / (self.samples + 1)) * (math.log(ratio) - self._drift)
        if self.samples % _SOLVE_EVERY == 0 or self.samples in _FIRST_SOLVES:
            self._solve(_SWEEPS)
        if known:
            size = _size(*shape[::2])
            ratio = _bounded(ms / max(_linear(self.coefficients, shape), _LEAST_MS), 4.0)
            self.factors[size] += _FACTOR_RATE * (ratio - self.factors[size])

    def _solve(self, sweeps: int) -> None:
        """Coordinate descent on sum of w (x . c - 1)^2 over the three memories, c >= 0, from the present solution."""
        # A calibration step counts as if it had taken as many times longer as other steps have.
        parts = [(self._with_prompts, 1.0), (self._without, 1.0), (self._calibration, math.exp(-self._drift))]
        gram = [[0.0] * len(TERMS) for _ in TERMS]
        moment = [0.0] * len(TERMS)
        for memory, scale in parts:
            weight = (_CALIBRATION_WEIGHT if memory is self._calibration else 1.0) / memory.newest
            for i, row in enumerate(memory.gram):
                moment[i] += weight * scale * memory.moment[i]
                for j, value in enumerate(row):
                    gram[i][j] += weight * scale * scale * value
        solution = self.coefficients
        for _ in range(sweeps):
            change = 0.0
            for i, row in enumerate(gram):
                if row[i] <= 0.0:
                    continue  # no sample has this term
                slope = sum(map(mul, row, solution)) - moment[i]
                new = max(0.0, solution[i] - slope / row[i])
                change = max(change, abs(new - solution[i]) * math.sqrt(row[i]))
                solution[i] = new
            if change < 1e-4:
                return


class _Memory:
    """Normal equations of samples whose weight fades."""

    def __init__(self, memory: float) -> None:
        self.gram = [[0.0] * len(TERMS) for _ in TERMS]
        self.moment = [0.0] * len(TERMS)
        self.newest = 1.0  # weight of the newest sample: it grows, instead of all others shrinking
        self._growth = math.exp(1 / memory)

    def add(self, features: Sequence[tuple[int, float]]) -> None:
        """One sample as (term, value) pairs, divided by its target."""
        self.newest *= self._growth
        for i, x in features:
            weighted, row = self.newest * x, self.gram[i]
            self.moment[i] += weighted
            for j, y in features:
                row[j] += weighted * y
        if self.newest > 1e12:
            self.gram = [[value / self.newest for value in row] for row in self.gram]
            self.moment = [value / self.newest for value in self.moment]
            self.newest = 1.0


def _features(sample: StepSample, ms: float) -> list[tuple[int, float]]:
    values = (1, sample.prefill_tokens, sample.prefill_context, sample.decode_streams, sample.decode_context)
    return [(term, value / ms) for term, value in enumerate(values) if value]


def _linear(coefficients: Sequence[float], shape: Sequence[float]) -> float:
    constant, token, pair, stream, depth = coefficients
    return max(constant + token * shape[0] + pair * shape[1] + stream * shape[2] + depth * shape[3], 1e-6)


def _size(prefill_tokens: float, streams: float) -> int:
    """Which factor a step has: by its prompt tokens if there are any, else by its streams."""
    return int(prefill_tokens).bit_length() - _FACTORS if prefill_tokens >= 1 else int(streams).bit_length()


def _bounded(ratio: float, most: float) -> float:
    return min(max(ratio, 1 / most), most)
