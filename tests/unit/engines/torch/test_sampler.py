from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from python_backends.core.errors import EngineFailure
from python_backends.core.types import SamplingParams
from python_backends.engines.paged.runner import Draw
from python_backends.engines.torch import sampler as sampler_module
from python_backends.engines.torch.sampler import Sampler, uniform

Floats = npt.NDArray[np.float64]

LARGE = 3000  # more than the leaders that the ranked way looks at


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_draw(
    *, prompt: Sequence[int] = (), output: Sequence[int] = (), banned: Sequence[int] = (), seed: int = 7, **sampling: Any
) -> Draw:
    params = SamplingParams(seed=seed, **sampling).validated()
    return Draw(params, prompt, output, banned)


def make_logits(rows: int, vocab_size: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def sample_one(logits: torch.Tensor, draw: Draw) -> int:
    return Sampler(logits.shape[-1]).sample(logits.reshape(1, -1), [draw])[0].token_id


def naive_scores(logits: torch.Tensor, draw: Draw) -> npt.NDArray[np.float32]:
    """Bias, penalties and bans, token by token, in float32 as in the sampler."""
    params = draw.sampling
    scores = logits.numpy().astype(np.float32)
    for token, bias in params.logit_bias.items():
        scores[token] += np.float32(bias)
    for token in {*draw.prompt_ids, *draw.output_ids}:
        penalty = np.float32(params.repetition_penalty)
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    for token, count in Counter(draw.output_ids).items():
        scores[token] -= np.float32(params.presence_penalty + params.frequency_penalty * count)
    for token in draw.banned_ids:
        scores[token] = -np.inf
    return scores


def naive_kept(logits: torch.Tensor, draw: Draw) -> tuple[list[int], Floats]:
    """Tokens that may be drawn, best first (ties by id), and their probabilities."""
    params = draw.sampling
    scores = naive_scores(logits, draw).astype(np.float64)
    order = np.lexsort((np.arange(len(scores)), -scores)).tolist()
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp((scores[order] - scores[order[0]]) / params.temperature)
    count, mass = 0, 0.0
    while count < len(order) and mass < params.top_p * weights.sum():
        mass += weights[count]
        count += 1
    kept = [token for token, weight in zip(order[:count], weights, strict=False) if weight >= params.min_p * weights[0]]
    return kept, weights[: len(kept)] / weights[: len(kept)].sum()


def naive_ranked_token(logits: torch.Tensor, draw: Draw) -> int:
    kept, probabilities = naive_kept(logits, draw)
    u = uniform(draw.sampling.seed or 0, len(draw.output_ids))
    return kept[int(np.searchsorted(np.cumsum(probabilities), u, side="right"))]


# --- the random numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    assert sampler_module._philox4x32(counter, key) == words


def test_uniform_is_pinned() -> None:
    """A change here changes every seeded text, and a request that moves between versions."""
    assert uniform(0, 0) == ((0x6627E8D5 << 32 | 0xE169C58D) >> 11) / 2**53
    assert len({uniform(seed, position) for seed in (0, 1, 2**32, 2**64 - 1) for position in range(100)}) == 400


def test_uniform_is_uniform_over_positions_and_over_seeds() -> None:
    for sample in ([uniform(3, i) for i in range(4000)], [uniform(i, 3) for i in range(4000)]):
        assert min(sample) >= 0
        assert max(sample) < 1
        counts = np.histogram(sample, bins=20, range=(0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 50  # 19 degrees of freedom: p < 1e-4


# --- each parameter against the naive reference -------------------------------------------------------------------

EDITS: list[dict[str, Any]] = [
    {"logit_bias": {3: 5.0, 17: -4.0}},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8},
    {"presence_penalty": -1.0, "frequency_penalty": 1.3},
    {"logit_bias": {5: 3.0, 8: 9.0}, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
]


@pytest.mark.parametrize("edits", EDITS)
def test_edits_follow_their_rules(edits: dict[str, Any]) -> None:
    sampler = Sampler(40)
    logits = make_logits(60, 40)
    draws = [
        make_draw(prompt=[i % 40, 3, 3], output=[(i * j) % 40 for j in range(6)] + [5, 5], temperature=0, **edits)
        for i in range(60)
    ]
    expected = [int(naive_scores(row, draw).argmax()) for row, draw in zip(logits, draws, strict=True)]
    assert [sampled.token_id for sampled in sampler.sample(logits, draws)] == expected
    assert expected != logits.argmax(dim=1).tolist()


def test_edits_also_hold_for_drawn_rows() -> None:
    logits = make_logits(50, 40)
    draws = [
        make_draw(
            prompt=[1, 2], output=[*range(i % 40)], banned=[i % 40], top_k=5, repetition_penalty=1.4, presence_penalty=0.3
        )
        for i in range(50)
    ]
    expected = [naive_ranked_token(row, draw) for row, draw in zip(logits, draws, strict=True)]
    assert [sampled.token_id for sampled in Sampler(40).sample(logits, draws)] == expected


def test_repetition_penalty_covers_the_prompt_and_presence_penalty_does_not() -> None:
    logits = torch.tensor([2.0, 1.9, -5.0])
    assert sample_one(logits, make_draw(prompt=[0], temperature=0, repetition_penalty=1.5)) == 1
    assert sample_one(logits, make_draw(prompt=[0], temperature=0, presence_penalty=2.0)) == 0
    assert sample_one(logits, make_draw(output=[0], temperature=0, presence_penalty=2.0)) == 1


def test_banned_tokens_are_never_chosen() -> None:
    logits = torch.tensor([9.0, 8.0, 1.0])
    assert sample_one(logits, make_draw(banned=[0], temperature=0)) == 1
    for position in range(50):
        assert sample_one(logits, make_draw(output=[2] * position, banned=[0, 1], temperature=50.0)) == 2


def test_ids_outside_the_vocabulary_have_no_effect() -> None:
    logits = make_logits(1, 10)
    draw = make_draw(
        prompt=[11],
        output=[12],
        banned=[10, 99],
        temperature=0,
        logit_bias={10: 100.0},
        repetition_penalty=2.0,
        presence_penalty=1,
    )
    assert sample_one(logits, draw) == int(logits.argmax())


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = torch.zeros(2, 100)
    logits[1, [70, 30, 90]] = 4.0
    assert [s.token_id for s in Sampler(100).sample(logits, [make_draw(temperature=0)] * 2)] == [0, 30]


FILTERS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 200},
    {"top_k": 2000},
    {"top_p": 0.05},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"top_k": 40, "top_p": 0.7},
    {"top_k": 40, "min_p": 0.3},
    {"top_p": 0.95, "min_p": 0.1, "temperature": 0.7},
    {"top_p": 0.9, "temperature": 3.0},
    {"top_k": 2000, "top_p": 0.8, "temperature": 5.0},
    {"top_p": 1e-9},
]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0])  # flat: all mass is outside the leaders, and all is a tie
def test_ranked_draws_equal_a_full_sort(filters: dict[str, Any], spread: float) -> None:
    logits = make_logits(4, LARGE, spread=spread)
    draws = [make_draw(output=[0] * i, seed=i * 99, **filters) for i in range(4)]
    expected = [naive_ranked_token(row, draw) for row, draw in zip(logits, draws, strict=True)]
    assert [sampled.token_id for sampled in Sampler(LARGE).sample(logits, draws)] == expected


@pytest.mark.parametrize("filters", FILTERS)
def test_ranked_draws_with_many_equal_logits(filters: dict[str, Any]) -> None:
    """bfloat16 logits are full of ties; which of them stay is by id."""
    logits = make_logits(6, LARGE).bfloat16().float()
    draws = [make_draw(output=[0] * i, seed=5, **filters) for i in range(6)]
    expected = [naive_ranked_token(row, draw) for row, draw in zip(logits, draws, strict=True)]
    assert [sampled.token_id for sampled in Sampler(LARGE).sample(logits, draws)] == expected


def test_the_leaders_suffice_on_a_usual_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_sort(_scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("the whole vocabulary was sorted")

    monkeypatch.setattr(sampler_module, "_ranking", no_sort)
    Sampler(LARGE).sample(make_logits(3, LARGE, spread=4.0), [make_draw(top_p=0.9), make_draw(top_k=50), make_draw(top_k=500)])


def test_min_p_alone_drops_the_unlikely() -> None:
    logits = torch.log(torch.tensor([0.02, 0.5, 0.06, 0.42]))
    drawn = {sample_one(logits, make_draw(output=[0] * i, min_p=0.1)) for i in range(300)}
    assert drawn == {1, 2, 3}


def test_top_p_counts_what_top_k_left() -> None:
    """[0.4, 0.3] of top_k=2 is [0.57, 0.43]: 0.5 is reached by the first alone."""
    logits = torch.log(torch.tensor([0.2, 0.3, 0.4, 0.1]))
    assert {sample_one(logits, make_draw(output=[0] * i, top_k=2, top_p=0.5)) for i in range(50)} == {2}
    assert {sample_one(logits, make_draw(output=[0] * i, top_p=0.5)) for i in range(50)} == {1, 2}


def test_extreme_temperatures() -> None:
    logits = make_logits(1, 500)
    for filters in ({}, {"top_k": 20}, {"top_p": 0.9}):
        assert sample_one(logits, make_draw(temperature=1e-300, **filters)) == int(logits.argmax())
    assert len({sample_one(logits, make_draw(output=[0] * i, temperature=100.0)) for i in range(100)}) > 70


# --- the distribution ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [{}, {"min_p": 0.05}, {"top_k": 6}, {"top_p": 0.8}, {"temperature": 2.0}])
@pytest.mark.parametrize("by", ["position", "seed"])
def test_draws_follow_the_distribution(filters: dict[str, Any], by: str) -> None:
    draws_total = 3000
    row = make_logits(1, 12, seed=4, spread=1.2)[0]
    draws = [
        make_draw(output=[0] * i, seed=11, **filters) if by == "position" else make_draw(seed=i, **filters)
        for i in range(draws_total)
    ]
    counts = Counter(s.token_id for s in Sampler(12).sample(row.expand(draws_total, -1), draws))
    kept, probabilities = naive_kept(row, make_draw(**filters))
    assert set(counts) <= set(kept)
    expected = probabilities * draws_total
    chi_square = sum((counts[token] - e) ** 2 / e for token, e in zip(kept, expected, strict=True))
    assert chi_square < 40  # at most 11 degrees of freedom: p < 1e-4


# --- determinism --------------------------------------------------------------------------------------------------

MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"top_k": 30},
    {"top_p": 0.9},
    {"top_k": 1500},
    {"min_p": 0.02},
    {"logprobs": 3},
    {"repetition_penalty": 1.2},
    {"temperature": 0, "frequency_penalty": 0.5},
    {"top_p": 0.999, "temperature": 3.0},
]


def test_a_row_draws_the_same_in_any_batch() -> None:
    sampler = Sampler(LARGE)
    logits = make_logits(20, LARGE)
    draws = [make_draw(output=[*range(i)], seed=1000 + i, **MIXED[i % len(MIXED)]) for i in range(20)]
    alone = [sampler.sample(logits[i : i + 1], [draws[i]])[0] for i in range(20)]
    assert sampler.sample(logits, draws) == alone
    shuffled = [*range(7, 20), *range(7)]
    assert sampler.sample(logits[shuffled], [draws[i] for i in shuffled]) == [alone[i] for i in shuffled]


def test_only_seed_and_position_move_the_draw() -> None:
    logits = make_logits(1, 1000)
    first = [sample_one(logits, make_draw(output=[i] * 3, seed=5)) for i in range(10)]
    assert len(set(first)) == 1
    assert len({sample_one(logits, make_draw(output=[0] * i, seed=5)) for i in range(40)}) > 10
    assert len({sample_one(logits, make_draw(seed=i)) for i in range(40)}) > 10
    assert sample_one(logits, make_draw(seed=2**64 - 1)) == sample_one(logits, make_draw(seed=2**64 - 1))


def test_the_logits_are_left_alone() -> None:
    logits = make_logits(len(MIXED), LARGE)
    before = logits.clone()
    draws = [make_draw(output=[1, 2], banned=[3], **sampling) for sampling in MIXED]
    Sampler(LARGE).sample(logits, draws)
    assert torch.equal(logits, before)


def test_the_logits_may_have_any_strides() -> None:
    logits = make_logits(6, 300)
    draws = [make_draw(output=[1, 2], banned=[3], seed=i, **MIXED[i]) for i in range(6)]
    padded = torch.cat([logits, logits], dim=1)[:, :300]
    expected = Sampler(300).sample(logits, draws)
    assert Sampler(300).sample(padded, draws) == expected
    assert Sampler(300).sample(logits.T.contiguous().T, draws) == expected


# --- log-probabilities --------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_model_before_any_edit() -> None:
    logits = make_logits(1, 50)
    reference = logits[0].double().log_softmax(dim=0)
    draw = make_draw(output=[4], logprobs=4, logit_bias={9: 100.0}, temperature=0.3, top_k=3, presence_penalty=1.0)
    sampled = Sampler(50).sample(logits, [draw])[0]
    assert sampled.token_id == 9
    assert sampled.logprob is not None
    assert sampled.logprob.token_id == 9
    assert sampled.logprob.logprob == pytest.approx(float(reference[9]), abs=1e-9)
    best = reference.argsort(descending=True)[:4].tolist()
    assert [token for token, _ in sampled.logprob.top] == best
    assert [value for _, value in sampled.logprob.top] == pytest.approx(reference[best].tolist(), abs=1e-9)


def test_logprobs_only_where_asked_for_and_as_many() -> None:
    logits = make_logits(3, 10)
    draws = [make_draw(), make_draw(logprobs=0), make_draw(logprobs=20)]
    none, own, top = Sampler(10).sample(logits, draws)
    assert none.logprob is None
    assert own.logprob is not None
    assert own.logprob.top == []
    assert top.logprob is not None
    assert len(top.logprob.top) == 10  # the whole vocabulary
    assert sum(math.exp(value) for _, value in top.logprob.top) == pytest.approx(1)


def test_top_logprobs_of_equals_are_the_lowest_ids() -> None:
    sampled = Sampler(500).sample(torch.zeros(1, 500), [make_draw(temperature=0, logprobs=3)])[0]
    assert sampled.logprob is not None
    assert [token for token, _ in sampled.logprob.top] == [0, 1, 2]


# --- broken logits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [*MIXED, {"temperature": 0, "logprobs": 1}])
@pytest.mark.parametrize("value", [-math.inf, math.nan, math.inf])
def test_a_row_without_a_distribution_is_named(sampling: dict[str, Any], value: float) -> None:
    logits = make_logits(3, LARGE)
    logits[1, :] = value
    draws = [make_draw(), make_draw(output=[1, 2], **sampling), make_draw(temperature=0)]
    with pytest.raises(EngineFailure, match=r"row 1 \(output position 2\)"):
        Sampler(LARGE).sample(logits, draws)


@pytest.mark.parametrize("sampling", MIXED)
def test_one_nan_is_enough(sampling: dict[str, Any]) -> None:
    logits = make_logits(1, LARGE)
    logits[0, 1234] = math.nan
    with pytest.raises(EngineFailure, match="row 0"):
        Sampler(LARGE).sample(logits, [make_draw(**sampling)])


def test_all_banned_is_a_failure() -> None:
    with pytest.raises(EngineFailure, match="row 0"):
        sample_one(make_logits(1, 3), make_draw(banned=[0, 1, 2]))


def test_partly_masked_logits_are_fine() -> None:
    logits = torch.full((1, LARGE), -math.inf)
    logits[0, [5, 2500]] = 1.0
    for filters in ({}, {"top_k": 10}, {"top_p": 0.99}, {"temperature": 0}):
        assert {sample_one(logits, make_draw(output=[0] * i, **filters)) for i in range(20)} <= {5, 2500}


def test_a_wrong_shape_is_named() -> None:
    with pytest.raises(EngineFailure, match=r"\[2, 9\].*\[2, 10\]"):
        Sampler(10).sample(torch.zeros(2, 9), [make_draw()] * 2)


def test_no_rows() -> None:
    assert Sampler(10).sample(torch.zeros(0, 10), []) == []
