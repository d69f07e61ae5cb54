from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from python_backends.core.errors import EngineFailure
from python_backends.core.types import SamplingParams
from python_backends.engines.paged.runner import Draw, Slice
from python_backends.engines.torch.kernels.attention import SPAN, TILE_QUERIES
from python_backends.engines.torch.kernels.forward import Step
from python_backends.engines.torch.kernels.steps import lay_out

GROUP = 3
TILE_TOKENS = TILE_QUERIES // GROUP
FREQUENCIES = np.array([1.0, 0.01], np.float32)
DRAW = Draw(SamplingParams(temperature=0, seed=0), [], [], [])


def piece(start: int, tokens: Sequence[int], *, draws: bool = True, drafts: int = 0) -> Slice:
    return Slice(tokens, start, [0], DRAW if draws else None, drafts)


def laid_out(*slices: Slice, vocab_size: int = 100) -> Step:
    return lay_out(slices, [np.zeros(1, np.int64) for _ in slices], GROUP, FREQUENCIES, vocab_size)


def test_tokens_lie_flat_and_know_their_slice_and_position() -> None:
    step = laid_out(piece(7, [1]), piece(3, [2, 3, 4]))
    assert step.tokens.tolist() == [1, 2, 3, 4]
    assert step.positions.tolist() == [7, 3, 4, 5]
    assert step.slices.tolist() == [0, 1, 1, 1]
    assert (step.starts.tolist(), step.begins.tolist(), step.counts.tolist()) == ([7, 3], [0, 1], [1, 3])


def test_angles_are_position_times_frequency() -> None:
    step = laid_out(piece(5000, [1, 2]))
    angles = np.array([[5000.0], [5001.0]], np.float32) * FREQUENCIES
    assert np.array_equal(step.cos, np.cos(angles))
    assert np.array_equal(step.sin, np.sin(angles))


def test_the_last_token_of_a_slice_draws_and_the_drafts_before_it() -> None:
    step = laid_out(piece(0, [1, 2]), piece(0, [1, 2, 3], draws=False), piece(9, [1, 2, 3, 4], drafts=2))
    assert step.drawing.tolist() == [1, 6, 7, 8]


def test_short_slices_share_out_spans_and_long_ones_tiles() -> None:
    prompt = [1] * (2 * TILE_TOKENS + 5)
    step = laid_out(piece(SPAN, [1]), piece(0, prompt, draws=False), piece(SPAN - 1, [1]))
    assert step.short.tolist() == [0, 2]
    assert step.spans.tolist() == [[0, 0], [0, 1], [2, 0]]
    assert step.first_span.tolist() == [0, 2, 2]
    assert step.tiles.tolist() == [[1, 0, TILE_TOKENS], [1, TILE_TOKENS, TILE_TOKENS], [1, 2 * TILE_TOKENS, 5]]


def test_nothing_to_compute() -> None:
    step = laid_out()
    assert (step.tokens.size, step.spans.shape, step.tiles.shape, step.drawing.size) == (0, (0, 2), (0, 3), 0)


@pytest.mark.parametrize("token", [-1, 100])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(EngineFailure, match="outside the model's vocabulary of 100"):
        laid_out(piece(0, [5, token]))
