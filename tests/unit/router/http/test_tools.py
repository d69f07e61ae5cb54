"""Tools: what is refused, how calls are found in text, how history is told to templates that know no tools."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from router.http.errors import ApiError
from router.http.tools import Call, CallFinder, Choice, Toolbox, ToolSpec, spelled_out, with_parsed_arguments

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": {"properties": {"city": {"type": "string"}}}},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def _box(tools: list[Any], choice: Any = None) -> Toolbox:
    return Toolbox(msgspec.convert(tools, list[ToolSpec]), msgspec.convert(choice, Choice | None), parallel=True)


def test_tools_are_in_use_unless_told_not_to() -> None:
    assert _box([WEATHER]).in_use
    assert not _box([WEATHER], "none").in_use
    assert not _box([]).in_use
    assert "weather" in _box([WEATHER], "required").grammar()


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([WEATHER, WEATHER], None, "tools"),
        ([WEATHER], {"type": "function", "function": {"name": "time"}}, "tool_choice"),
        ([], "required", "tool_choice"),
    ],
)
def test_what_is_wrong_is_named(tools: list[Any], choice: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        _box(tools, choice)
    assert caught.value.param == param


def test_parameters_that_are_no_schema() -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "nonsense"}}}}}
    with pytest.raises(ApiError, match="nonsense") as caught:
        _box([bad]).grammar()
    assert caught.value.param == "tools"


def test_instructions_join_the_system_message() -> None:
    told = _box([WEATHER]).instructed([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}])
    assert [message["role"] for message in told] == ["system", "user"]
    assert told[0]["content"].startswith("Be kind.")
    assert "of a city" in told[0]["content"]
    assert _box([WEATHER]).instructed([{"role": "user", "content": "hi"}])[0]["role"] == "system"


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_calls_are_found_however_the_text_is_cut(step: int) -> None:
    text = f"Well <b>, {CALL}\n{CALL} bye <tool"
    finder, shown = CallFinder(), ""
    calls: list[Call] = []
    for i in range(0, len(text), step):
        more, found = finder.push(text[i : i + step], final=False)
        shown, calls = shown + more, calls + found
    more, found = finder.push("", final=True)
    assert [call.name for call in calls + found] == ["weather", "weather"]
    assert {call.arguments for call in calls} == {'{"city": "Rome"}'}
    assert len({call.id for call in calls}) == 2
    assert (shown + more).startswith("Well <b>, ")
    assert "tool_call" not in shown
    assert finder.found == 2


def test_text_without_calls_is_text() -> None:
    finder = CallFinder()
    assert finder.push("a < b <tool", final=False) == ("a < b ", [])
    assert finder.push("s>", final=False) == ("<tools>", [])
    assert finder.push(" end <", final=True) == (" end <", [])


def test_a_call_that_was_cut_short_is_left_as_text() -> None:
    shown, calls = CallFinder().push('<tool_call>\n{"name": "wea', final=True)
    assert (shown, calls) == ('<tool_call>\n{"name": "wea', [])


def test_history_in_words() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    told = spelled_out(with_parsed_arguments(messages))
    assert told == [
        {"role": "assistant", "content": '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'},
        {"role": "user", "content": "<tool_response>\n42\n</tool_response>"},
    ]
    with pytest.raises(ApiError, match="not JSON") as caught:
        with_parsed_arguments([{**messages[0], "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}])
    assert caught.value.param == "messages[0].tool_calls[0].function.arguments"
