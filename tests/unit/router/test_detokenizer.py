from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.detokenizer import Detokenizer
from router.tokenizer import Tokenizer
from tests.unit.router.model_dirs import SENTENCES, byte_fallback, byte_level

BROKEN = "\ufffd"

texts = st.text(st.characters(codec="utf-8"), max_size=80)
few_letters = st.text("ab 你é", max_size=40)  # stop strings are found often
cuts = st.lists(st.integers(1, 7), min_size=1, max_size=10)  # sizes of the chunks, repeated
stops = st.lists(st.text("ab 你é", min_size=1, max_size=4), max_size=4)
fast = settings(max_examples=150, deadline=None)


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = request.param(tmp_path_factory.mktemp("model"))
    return Tokenizer(directory)


def push_all(detokenizer: Detokenizer, token_ids: Sequence[int], sizes: Sequence[int] = (1,)) -> list[str]:
    parts = []
    start = turn = 0
    while start < len(token_ids):
        size = sizes[turn % len(sizes)]
        parts.append(detokenizer.push(token_ids[start : start + size]))
        start, turn = start + size, turn + 1
    return [*parts, detokenizer.finish()]


def first_stop(text: str, stop: Sequence[str], start: int = 0) -> int | None:
    return min((at for at in (text.find(one, start) for one in stop) if at >= 0), default=None)


# --- characters ---------------------------------------------------------------------------------------------------


@fast
@given(text=texts, sizes=cuts)
def test_the_parts_are_the_whole(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    ids = tokenizer.encode(text)
    parts = push_all(Detokenizer(tokenizer, (), 0), ids, sizes)
    assert "".join(parts) == tokenizer.decode(ids)
    assert not any(part.endswith(BROKEN) for part in parts[:-1])


@fast
@given(prompt=texts, text=texts, sizes=cuts)
def test_the_output_reads_on_from_the_prompt(tokenizer: Tokenizer, prompt: str, text: str, sizes: list[int]) -> None:
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(text)
    whole = tokenizer.decode([*prompt_ids, *ids])
    parts = push_all(Detokenizer(tokenizer, (), 0, prompt_ids), ids, sizes)
    assert tokenizer.decode(prompt_ids) + "".join(parts) == whole


@fast
@given(data=st.data(), sizes=cuts)
def test_any_tokens_of_a_byte_level_model(bytes_tokenizer: Tokenizer, data: st.DataObject, sizes: list[int]) -> None:
    """Bytes that are no text, special tokens, and ids beyond the vocabulary (padded logits) included."""
    ids = data.draw(st.lists(st.integers(0, bytes_tokenizer.vocab_size + 5), max_size=120))
    parts = push_all(Detokenizer(bytes_tokenizer, (), 0), ids, sizes)
    assert "".join(parts) == bytes_tokenizer.decode(ids)
    assert not any(part.endswith(BROKEN) for part in parts[:-1])


def test_a_continuation_keeps_its_leading_space(tokenizer: Tokenizer) -> None:
    prompt_ids = tokenizer.encode("The quick")
    ids = tokenizer.encode("The quick dog")[len(prompt_ids) :]
    assert "".join(push_all(Detokenizer(tokenizer, (), 0, prompt_ids), ids)) == " dog"


@pytest.mark.parametrize("prompt", ["", "x", "日本"])
def test_a_character_waits_for_its_last_token(tokenizer: Tokenizer, prompt: str) -> None:
    prompt_ids = tokenizer.encode(prompt)
    ids = tokenizer.encode(prompt + "𝄞")[len(prompt_ids) :]
    assert push_all(Detokenizer(tokenizer, (), 0, prompt_ids), ids[-4:]) == ["", "", "", "𝄞", ""]


def test_an_unfinished_character_appears_at_the_end(bytes_tokenizer: Tokenizer) -> None:
    ids = bytes_tokenizer.encode("x🦊")[:-1]
    assert push_all(Detokenizer(bytes_tokenizer, (), 0), ids)[-1] == BROKEN


def test_special_tokens_leave_no_trace(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The dog")
    with_special = [token for pair in zip(ids, [0] * len(ids), strict=True) for token in pair]
    assert "".join(push_all(Detokenizer(tokenizer, (), 0), with_special)) == "The dog"


def test_the_window_stays_short(bytes_tokenizer: Tokenizer) -> None:
    """Whatever comes: bytes that never become text, characters of many tokens, plain text."""
    longest = 0

    class Watched:
        def decode(self, token_ids: Sequence[int]) -> str:
            nonlocal longest
            longest = max(longest, len(token_ids))
            return bytes_tokenizer.decode(token_ids)

        def is_silent(self, token_id: int) -> bool:
            return bytes_tokenizer.is_silent(token_id)

    continuation = bytes_tokenizer.encode("🦊")[-1]
    noise = [continuation] * 300
    ids = [*noise, *bytes_tokenizer.encode("".join(SENTENCES) * 5), *noise, *bytes_tokenizer.encode("🦊🦊")]
    detokenizer = Detokenizer(Watched(), (), 0, bytes_tokenizer.encode(SENTENCES[0] * 10))
    assert "".join(push_all(detokenizer, ids)) == bytes_tokenizer.decode(ids)
    assert longest < 20


def test_byte_fallback_noise_stays_bounded_and_text_comes_back(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_fallback(tmp_path))
    fox = tokenizer.encode("🦊")[-4:]
    text = "".join(push_all(Detokenizer(tokenizer, (), 0), [*fox[1:] * 30, *tokenizer.encode("dog")[1:]]))
    assert text == BROKEN * 90 + " dog"


# --- stop strings -------------------------------------------------------------------------------------------------


@fast
@given(text=few_letters, stop=stops, sizes=cuts)
def test_stops_are_those_of_the_whole_text(tokenizer: Tokenizer, text: str, stop: list[str], sizes: list[int]) -> None:
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    at = first_stop(whole, stop)
    detokenizer = Detokenizer(tokenizer, stop, 0)
    assert "".join(push_all(detokenizer, ids, sizes)) == whole[:at]
    assert detokenizer.stopped == (at is not None)


@fast
@given(text=few_letters, stop=stops, sizes=cuts, min_tokens=st.integers(0, 12))
def test_min_tokens_are_not_searched(
    bytes_tokenizer: Tokenizer, text: str, stop: list[str], sizes: list[int], min_tokens: int
) -> None:
    ids = bytes_tokenizer.encode(text)
    searched_from = len(bytes_tokenizer.decode(ids[:min_tokens]).rstrip(BROKEN)) if min_tokens < len(ids) else len(text)
    at = first_stop(text, stop, searched_from)
    detokenizer = Detokenizer(bytes_tokenizer, stop, min_tokens)
    assert "".join(push_all(detokenizer, ids, sizes)) == text[:at]
    assert detokenizer.stopped == (at is not None)


@fast
@given(text=few_letters, stop=stops)
def test_only_what_may_become_a_stop_is_held_back(bytes_tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    ids = bytes_tokenizer.encode(text)
    detokenizer = Detokenizer(bytes_tokenizer, stop, 0)
    shown = ""
    for count, token_id in enumerate(ids, start=1):
        shown += detokenizer.push([token_id])
        if detokenizer.stopped:
            break
        known = bytes_tokenizer.decode(ids[:count]).rstrip(BROKEN)
        held = known[len(shown) :]
        assert known.startswith(shown)
        assert not held or any(one.startswith(held) for one in stop) or first_stop(held, stop) is not None


@fast
@given(text=few_letters, stop=stops, sizes=cuts)
def test_the_count_of_consumed_tokens_does_not_depend_on_chunks(
    bytes_tokenizer: Tokenizer, text: str, stop: list[str], sizes: list[int]
) -> None:
    ids = bytes_tokenizer.encode(text)
    by_one, by_chunks = Detokenizer(bytes_tokenizer, stop, 0), Detokenizer(bytes_tokenizer, stop, 0)
    push_all(by_one, ids)
    push_all(by_chunks, ids, sizes)
    assert by_chunks.num_consumed == by_one.num_consumed


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per character."""
    return [token_id for character in text for token_id in tokenizer.encode(character)]


def test_text_before_a_stop_is_returned_and_nothing_after_it(bytes_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(bytes_tokenizer, ["STOP"], 0)
    assert detokenizer.push(letters(bytes_tokenizer, "go S")) == "go "
    assert detokenizer.push(letters(bytes_tokenizer, "TO")) == ""
    assert detokenizer.push(letters(bytes_tokenizer, "P and more")) == ""
    assert detokenizer.stopped
    assert detokenizer.num_consumed == len("go STOP")
    assert detokenizer.push(letters(bytes_tokenizer, "never")) == ""
    assert detokenizer.finish() == ""
    assert detokenizer.num_consumed == len("go STOP")


def test_a_false_start_is_shown_as_soon_as_it_is_one(bytes_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(bytes_tokenizer, ["aab"], 0)
    assert [detokenizer.push([token]) for token in letters(bytes_tokenizer, "aaac")] == ["", "", "a", "aac"]


def test_the_stop_that_begins_first_wins(bytes_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(bytes_tokenizer, ["b", "abc"], 0)
    assert "".join(push_all(detokenizer, letters(bytes_tokenizer, "xabcd"))) == "x"
    detokenizer = Detokenizer(bytes_tokenizer, ["b", "abc"], 0)
    assert "".join(push_all(detokenizer, letters(bytes_tokenizer, "xabd"))) == "xa"


def test_a_stop_decided_only_by_the_end(bytes_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(bytes_tokenizer, ["b", "abc"], 0)
    assert detokenizer.push(letters(bytes_tokenizer, "xab")) == "x"
    assert detokenizer.finish() == "a"
    assert detokenizer.stopped


def test_half_a_stop_at_the_end_is_text(bytes_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(bytes_tokenizer, ["END"], 0)
    parts = push_all(detokenizer, letters(bytes_tokenizer, "the EN"))
    assert parts[-1] == "EN"
    assert not detokenizer.stopped


def test_the_prompt_is_not_searched(bytes_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(bytes_tokenizer, ["ab"], 0, letters(bytes_tokenizer, "xa"))
    assert "".join(push_all(detokenizer, letters(bytes_tokenizer, "b"))) == "b"


def test_a_stop_that_begins_within_min_tokens_does_not_count(bytes_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(bytes_tokenizer, ["ab"], 1)
    assert "".join(push_all(detokenizer, letters(bytes_tokenizer, "abxaby"))) == "abx"
