"""Grammars: what they let through, token by token, and what can't be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from llguidance import LLMatcher, LLTokenizer

from python_backends.core.errors import InvalidRequest
from router.grammar import Tool, ebnf, json_object, json_schema, regex, tool_calls

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOLS = [Tool("weather", CITY), Tool("time", {})]
BEGIN, END = "<call>", "</call>"
CALL = f'{BEGIN}{{"name": "weather", "arguments": {{"city": "Rome"}}}}{END}'

Fits = Callable[[str, str], bool]


@pytest.fixture(scope="module")
def fits(smollm2_dir: Path) -> Fits:
    """Whether a text is a sentence of a grammar."""
    tokenizer = LLTokenizer(str(smollm2_dir / "tokenizer.json"))

    def check(grammar: str, text: str) -> bool:
        matcher, tokens = LLMatcher(tokenizer, grammar, log_level=0), tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    return check


def test_json(fits: Fits) -> None:
    assert fits(json_schema(CITY), '{"city": "Rome"}')
    for text in ('{"city": 5}', "{}", '{"city": "Rome", "x": 1}', '{"city": "Ro', "Rome", '{"city":    "Rome"}'):
        assert not fits(json_schema(CITY), text), text
    assert fits(json_object(), '{"any": [1, {"thing": null}]}')
    assert not fits(json_object(), "[1]")


def test_regex_and_ebnf(fits: Fits) -> None:
    assert fits(regex("[0-9]{4}"), "2026")
    assert not fits(regex("[0-9]{4}"), "26")
    assert fits(ebnf('root ::= "yes" | "no"'), "yes")
    assert fits(ebnf('start: "yes" | "no"'), "no")
    assert not fits(ebnf('root ::= "yes" | "no"'), "maybe")


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("required", [True, False])
def test_tool_calls(fits: Fits, required: bool, parallel: bool) -> None:
    grammar = tool_calls(TOOLS, BEGIN, END, required=required, parallel=parallel)
    assert fits(grammar, CALL)
    assert fits(grammar, CALL * 2) is parallel
    assert fits(grammar, "Hello, a < b") is not required
    assert fits(grammar, f"Let me look. {CALL}") is not required
    assert not fits(grammar, f'{BEGIN}{{"name": "wether", "arguments": {{}}}}{END}')
    assert not fits(grammar, f'{BEGIN}{{"name": "weather", "arguments": {{"town": "Rome"}}}}{END}')


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: json_schema({"type": "nonsense"}), "json_schema: .*nonsense"),
        (lambda: regex("("), "regex: "),
        (lambda: ebnf("root ::= ("), "ebnf"),
        (lambda: tool_calls([Tool("f", {"properties": 5})], BEGIN, END, required=True, parallel=True), "tools: "),
    ],
)
def test_what_can_not_be_read(make: Callable[[], str], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        make()
