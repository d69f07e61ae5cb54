from __future__ import annotations

import random
from array import array

from hypothesis import given
from hypothesis import strategies as st

from python_backends.engines.paged.speculation import Drafts, StepCost, lookup


def naive_lookup(tokens: list[int], most: int) -> list[int]:
    for size in (3, 2):
        for first in range(len(tokens) - size - 1, -1, -1):
            if len(tokens) > size and tokens[first : first + size] == tokens[-size:]:
                guesses = list(tokens)
                for index in range(most):
                    guesses.append(guesses[first + size + index])
                return guesses[len(tokens) :]
    return []


@given(st.lists(st.sampled_from([0, 1, 2, 256, 65536, 2**24]), max_size=40), st.integers(1, 6))
def test_lookup_finds_the_last_occurrence_of_the_longest_match(tokens: list[int], most: int) -> None:
    assert lookup(array("i", tokens), most) == naive_lookup(tokens, most)


def test_wrong_guesses_end_guessing_and_it_is_tried_again_later() -> None:
    drafts, tokens = Drafts(), [1, 2, 3, 4, 1, 2, 3]
    assert drafts.propose(tokens, 4, 0.1) == [4, 1, 2, 3]
    tries = 0
    while drafts.propose(tokens, 4, 0.3):
        drafts.learn(4, 0, len(tokens))
        tries += 1
        assert tries < 12
    tokens += [*range(100, 163), 1, 2, 3]
    assert drafts.propose(tokens, 4, 0.3)
    drafts.learn(4, 0, len(tokens))
    assert not drafts.propose(tokens, 4, 0.3)


def test_right_guesses_become_longer() -> None:
    drafts, tokens = Drafts(), [5, 6] * 10
    assert len(drafts.propose(tokens, 4, 0.4)) == 1
    for _ in range(20):
        drafts.learn(2, 2, len(tokens))
    assert drafts.propose(tokens, 4, 0.4) == [5, 6, 5, 6]


def test_nothing_is_guessed_that_does_not_pay() -> None:
    assert Drafts().propose([5, 6] * 10, 4, 0.9) == []
    assert Drafts().propose([5, 6] * 10, 0, 0.0) == []


def test_step_cost_learns_what_a_token_adds() -> None:
    cost, rng = StepCost(), random.Random(0)
    assert 0 < cost.marginal(1) < cost.marginal(32) < 1
    for _ in range(500):
        tokens = rng.randrange(1, 10)
        cost.learn(tokens, 0.02 + 0.004 * tokens)
    assert abs(cost.marginal(1) - 0.004 / 0.024) < 0.01
    assert abs(cost.marginal(10) - 0.04 / 0.06) < 0.01


def test_steps_of_one_size_say_nothing_about_another_token() -> None:
    cost = StepCost()
    first = cost.marginal(4)
    for _ in range(50):
        cost.learn(4, 0.1)
    assert cost.marginal(4) == first
