"""Prompts: equal blocks are equal tokens, and text has as many tokens as were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.prompts import WORDS, TextPrompts, TokenPrompts
from loadtest.workload import Planned
from router.tokenizer import Tokenizer


def _planned(input_tokens: int, *blocks: int, block_tokens: int = 64) -> Planned:
    return Planned(0.0, "test", input_tokens, 1, blocks, block_tokens)


def test_token_ids_are_in_range_and_as_many_as_asked() -> None:
    ids = TokenPrompts(1, 1000, 30_000).build(_planned(150, 1, 2, 3))
    assert len(ids) == 150
    assert all(1000 <= token_id < 30_000 for token_id in ids)
    assert len(set(ids)) > 100


def test_shared_blocks_are_shared_prefixes_and_nothing_else_is() -> None:
    prompts = TokenPrompts(1, 1000, 30_000)
    one, two = prompts.build(_planned(192, 1, 2, 3)), prompts.build(_planned(180, 1, 2, 4))
    assert one[:128] == two[:128]
    assert one[128] != two[128]
    assert TokenPrompts(1, 1000, 30_000).build(_planned(192, 1, 2, 3)) == one, "the same in another process"
    other = TokenPrompts(2, 1000, 30_000).build(_planned(192, 1, 2, 3))
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 5, "another nonce shares nothing"


def test_large_block_ids() -> None:
    assert len(TokenPrompts(2**31, 0, 9).build(_planned(5, 1 << 40))) == 5


@pytest.mark.weights
def test_every_word_is_one_token_wherever_it_stands(smollm2_dir: Path) -> None:
    tokenizer = Tokenizer(smollm2_dir)
    assert [word for word in WORDS if len(tokenizer.encode(f" {word}")) != 1] == []
    prompts = TextPrompts(3)
    whole = tokenizer.encode(prompts.build(_planned(500, 1, 2, 3, 4, 5, 6, 7, 8)))
    assert len(whole) == 500
    head = tokenizer.encode(prompts.build(_planned(256, 1, 2, 3, 4)))
    assert whole[:256] == head


def test_words_are_many_enough() -> None:
    assert len(set(WORDS)) == len(WORDS) > 150
