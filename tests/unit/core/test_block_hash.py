from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends.core.block_hash import HASH_BYTES, block_hash, block_hashes, chain_root, content_hash

ROOT = chain_root("f" * 32, "")
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=70)


def test_one_hash_per_full_block() -> None:
    for count, expected in [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2)]:
        assert len(block_hashes(range(count), 4, ROOT)) == expected
    assert all(len(hash_) == HASH_BYTES for hash_ in block_hashes(range(64), 4, ROOT))


def test_known_value() -> None:
    """Hashes are names in other processes' caches: a change of the algorithm must be a decision."""
    assert chain_root("fingerprint", "tenant").hex() == "918515083b929237ff465df9446a6f08"
    assert block_hash(chain_root("fingerprint", "tenant"), [1, 2, 49_151]).hex() == "134ab8e3970dca4394070702e83ba054"


@given(tokens, tokens)
def test_equal_prefixes_have_equal_hashes_and_others_not(one: list[int], two: list[int]) -> None:
    hashes_one, hashes_two = block_hashes(one, 4, ROOT), block_hashes(two, 4, ROOT)
    for i, (hash_one, hash_two) in enumerate(zip(hashes_one, hashes_two, strict=False)):
        assert (hash_one == hash_two) == (one[: (i + 1) * 4] == two[: (i + 1) * 4])


@given(tokens)
def test_hashes_of_a_prefix_are_a_prefix_of_the_hashes(token_ids: list[int]) -> None:
    whole = block_hashes(token_ids, 4, ROOT)
    for end in range(len(token_ids)):
        assert block_hashes(token_ids[:end], 4, ROOT) == whole[: end // 4]


def test_same_block_after_another_has_another_hash() -> None:
    first, second = block_hashes([1, 2, 3, 4] * 2, 4, ROOT)
    assert first != second


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", ""), ("b", "")),
        (("a", "tenant"), ("a", "other")),
        (("a", "tenant"), ("a", "")),
        (("a", "b"), ("ab", "")),
        (("", "ab"), ("a", "b")),
    ],
)
def test_fingerprint_and_salt_isolate(one: tuple[str, str], other: tuple[str, str]) -> None:
    prompt = list(range(16))
    hashes = block_hashes(prompt, 4, chain_root(*one))
    assert set(hashes).isdisjoint(block_hashes(prompt, 4, chain_root(*other)))


@given(tokens, tokens)
def test_content_hash_names_all_tokens(one: list[int], two: list[int]) -> None:
    def content(token_ids: list[int]) -> bytes:
        return content_hash(token_ids, block_hashes(token_ids, 4, ROOT), 4, ROOT)

    assert (content(one) == content(two)) == (one == two)


def test_content_hash_differs_by_salt() -> None:
    other = chain_root("f" * 32, "tenant")
    assert content_hash([1], [], 4, ROOT) != content_hash([1], [], 4, other)
