from __future__ import annotations

from collections.abc import Sequence

from python_backends.core.block_hash import block_hashes, chain_root
from python_backends.core.types import BlockHash
from router.prompt import Prompt

IDS = list(range(100))


def test_hashes_are_those_that_workers_use() -> None:
    prompt = Prompt(IDS, "tenant")
    assert len(prompt) == 100
    assert prompt.hashes("f", 16) == block_hashes(IDS, 16, chain_root("f", "tenant"))
    assert prompt.hashes("f", 16) != prompt.hashes("g", 16)
    assert prompt.hashes("f", 16) != Prompt(IDS, "other").hashes("f", 16)


def test_the_block_of_the_last_token_never_counts() -> None:
    assert len(Prompt(IDS[:48], "").hashes("f", 16)) == 2
    assert len(Prompt(IDS[:49], "").hashes("f", 16)) == 3
    assert Prompt([], "").hashes("f", 16) == []


def test_they_are_made_once_per_model() -> None:
    asked: list[BlockHash] = []

    def hasher(token_ids: Sequence[int], size: int, root: BlockHash) -> list[BlockHash]:
        asked.append(root)
        return block_hashes(token_ids, size, root)

    prompt = Prompt(IDS, "", hasher)
    for _ in range(3):
        prompt.hashes("f", 16)
        prompt.hashes("g", 16)
    assert asked == [chain_root("f", ""), chain_root("g", "")]
