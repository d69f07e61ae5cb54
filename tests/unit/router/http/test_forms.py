"""Answers in OpenAI's two forms."""

from __future__ import annotations

from python_backends.core.types import FinishReason, TokenLogprob
from router.http.forms import ChatForm, CompletionForm, Tally, tally
from router.http.tools import CallFinder
from router.types import Piece


def _piece(text: str, ids: list[int], finish: FinishReason | None = None, prompt: int = 10) -> Piece:
    entries = [TokenLogprob(token, -0.5, [(token, -0.5), (1, -2.0)]) for token in ids]
    return Piece(text, ids, entries, -0.5 * len(ids), prompt, finish)


def _word(token: int) -> str:
    return f"w{token}"


def test_a_chat_answer_whole() -> None:
    form = ChatForm("m", _word, choices=2, with_proof=True, with_logprobs=True)
    whole = form.whole([_piece("one", [5, 6], FinishReason.STOP), _piece("two", [7], FinishReason.LENGTH)])
    assert whole["object"] == "chat.completion"
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["one", "two"]
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["stop", "length"]
    first = whole["choices"][0]["logprobs"]["content"][0]
    assert (first["token"], first["bytes"], first["logprob"]) == ("w5", [119, 53], -0.5)
    assert [top["token"] for top in first["top_logprobs"]] == ["w5", "w1"]
    assert whole["usage"]["prompt_tokens"] == 10, "choices of one prompt share it"
    assert (whole["usage"]["completion_tokens"], whole["usage"]["total_tokens"]) == (3, 13)
    assert "baton" not in whole, "there was no proof"


def test_a_chat_answer_in_chunks() -> None:
    form = ChatForm("m", _word, choices=1, with_proof=False, with_logprobs=False)
    opening = form.opening(0)
    assert opening is not None
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    middle, last = form.chunk(0, _piece("one", [5])), form.chunk(0, _piece("", [2], FinishReason.STOP))
    assert middle is not None
    assert last is not None
    assert (middle["choices"][0]["delta"], middle["choices"][0]["finish_reason"]) == ({"content": "one"}, None)
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert opening["id"] == middle["id"] == last["id"] == form.id
    assert middle["choices"][0]["logprobs"] is None
    usage = form.usage_chunk([Tally(10, 2, 4)])
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_who_counts_tokens_has_chunks_of_those_that_say_nothing_yet() -> None:
    silent = Piece("", [7], [], 0.0, 3)
    quiet = ChatForm("m", _word, choices=1, with_proof=False, with_logprobs=False)
    assert quiet.chunk(0, silent) is None
    counting = ChatForm("m", _word, choices=1, with_proof=False, with_logprobs=False, with_blanks=True)
    chunk = counting.chunk(0, silent)
    assert chunk is not None
    assert chunk["choices"][0]["delta"] == {"content": ""}
    counted = counting.counted(chunk, [tally(silent)])
    assert (counted["usage"]["prompt_tokens"], counted["usage"]["completion_tokens"]) == (3, 1)


def test_completions_echo_and_count_offsets() -> None:
    form = CompletionForm("m", _word, choices=1, with_proof=False, with_logprobs=True, echoes=["abc", ""])
    opening = form.opening(0)
    assert opening is not None
    assert opening["choices"][0]["text"] == "abc"
    assert form.opening(1) is None
    chunks = [form.chunk(0, _piece("xy", [5, 6])), form.chunk(0, _piece("z", [700], FinishReason.LENGTH))]
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[3, 5], [7]]
    assert chunks[0]["choices"][0]["logprobs"]["top_logprobs"][0] == {"w5": -0.5, "w1": -2.0}
    fresh = CompletionForm("m", _word, choices=1, with_proof=False, with_logprobs=False, echoes=["abc", ""])
    whole = fresh.whole([_piece("1", [1]), _piece("2", [2], prompt=7)])
    assert [choice["text"] for choice in whole["choices"]] == ["abc1", "2"]
    assert whole["usage"]["prompt_tokens"] == 17


def test_tool_calls_in_chunks_and_whole() -> None:
    text = 'Let me see. <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    parts = [text[i : i + 5] for i in range(0, len(text), 5)]
    form = ChatForm("m", _word, choices=1, with_proof=False, with_logprobs=False, finders=[CallFinder()])
    chunks = [form.chunk(0, _piece(part, [5])) for part in parts[:-1]]
    chunks.append(form.chunk(0, _piece(parts[-1], [2], FinishReason.STOP)))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk is not None]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see. "
    (call,) = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert (call["index"], call["type"], call["function"]) == (0, "function", {"name": "f", "arguments": '{"x": 1}'})
    last = chunks[-1]
    assert last is not None
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    fresh = ChatForm("m", _word, choices=1, with_proof=False, with_logprobs=False, finders=[CallFinder()])
    whole = fresh.whole([_piece(text, [5], FinishReason.STOP)])["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"].strip() == "Let me see."
    assert whole["message"]["tool_calls"][0]["function"]["name"] == "f"
