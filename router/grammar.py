"""What clients ask of the form of an answer, as a grammar that the workers' guided decoding reads (llguidance's forms).

Every function returns a grammar for SamplingParams.grammar. Raises InvalidRequest for what can't be read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from llguidance import LLMatcher, gbnf_to_lark

from python_backends.core.errors import InvalidRequest

# JSON on one line: free white space lets small models go on with it for ever.
_JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_object() -> str:
    """Any JSON object."""
    return json_schema({"type": "object"})


def json_schema(schema: Mapping[str, Any]) -> str:
    """JSON that a JSON schema describes."""
    return _checked(LLMatcher.grammar_from_json_schema(dict(schema), overrides=_JSON_OPTIONS), "json_schema")


def regex(pattern: str) -> str:
    return _checked(LLMatcher.grammar_from_regex(pattern), "regex")


def ebnf(text: str) -> str:
    """GBNF as in llama.cpp, or Lark."""
    try:
        lark = gbnf_to_lark.any_to_lark(text)
    except Exception as error:  # of a parser that raises what it likes
        raise InvalidRequest(f"the ebnf grammar can't be read: {error}") from None
    return _checked(LLMatcher.grammar_from_lark(lark), "ebnf grammar")


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may call. `parameters`: JSON schema of its arguments, an object."""

    name: str
    parameters: Mapping[str, Any]


def tool_calls(tools: Sequence[Tool], begin: str, end: str, *, required: bool, parallel: bool) -> str:
    """Calls as `begin`{"name": ..., "arguments": {...}}`end`; unless `required`, text may come before or instead of them."""
    schema = {"anyOf": [_call_schema(tool) for tool in tools], "x-guidance": _JSON_OPTIONS}
    rules = [f"call: %json {json.dumps(schema)} {json.dumps(end)}"]
    if required:
        rules += [f"start: (first){'+' if parallel else ''}", f"first: {json.dumps(begin)} call"]
    else:  # llguidance's structural tags: text runs on until the beginning of a call is seen
        rules += [
            f"start: {'(later)* rest' if parallel else 'later | rest'}",
            "rest: TEXT",
            f"beginning[lazy]: TEXT {json.dumps(begin)}",
            "later: beginning call",
            "TEXT: /(.|\\n)*/",
        ]
    return _checked(LLMatcher.grammar_from_lark("\n".join(rules)), "tools")


def _call_schema(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": {"type": "object", **tool.parameters}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _checked(grammar: str, what: str) -> str:
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise InvalidRequest(f"{what}: {' '.join(messages[0].split())}")
    return grammar
